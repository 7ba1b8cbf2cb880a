"""Configures the log."""

from __future__ import annotations

import logging
import sys

import structlog

from cachd.report.events import EventLog


def configure_logs(level: str, form: str, events: EventLog | None = None) -> None:
    """Log to standard error, from `level` on, in the `form` auto, json or text.

    Each log line of a request has who asked. `events` gets the lines from level info on, too.
    """
    least = logging.getLevelName(level.upper())
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if as_text else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if as_text:
        shared.append(_without_empty_values)
    heard: list[structlog.typing.Processor] = [structlog.contextvars.merge_contextvars]
    if events:
        heard += [events, _Level(least)]
    structlog.configure(
        processors=[*heard, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(min(least, logging.INFO) if events else least),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[libraries], force=True)


def _without_empty_values(
    _logger: object, _method: str, entry: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A processor for people: a value such as `code=` or `waits=None` tells them nothing."""
    return {key: value for key, value in entry.items() if value is not None and value not in ("", {}, [])}


class _Level:
    """A processor that drops what is below a level, after the event log has got it."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(
        self, _logger: object, method: str, entry: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        """Pass on an entry of the level or above. Raises structlog's DropEvent."""
        if logging.getLevelNamesMapping()[method.upper()] < self._least:
            raise structlog.DropEvent
        return entry
