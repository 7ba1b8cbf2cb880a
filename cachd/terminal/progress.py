"""Draws progress bars on a terminal, and nothing in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachd.errors import printable
from cachd.terminal.amounts import duration_text, rate_text, size_text
from cachd.terminal.models import Status

_BAR_WIDTH = 20
Update = Callable[[Status], None]


@contextmanager
def progress_bars() -> Iterator[Update]:
    """Yields a function that shows how a model is now, in a bar of its own."""
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    stderr = Console(stderr=True)
    full, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        progress.TextColumn("{task.description}", markup=False, table_column=full),
        progress.BarColumn(bar_width=_BAR_WIDTH),
        progress.TextColumn("{task.fields[figures]}", markup=False, table_column=full.copy()),
        progress.TextColumn("{task.fields[reason]}", markup=False, style="red", table_column=rest),
    )
    is_off = not stderr.is_terminal
    with progress.Progress(*columns, console=stderr, expand=True, disable=is_off) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def update(status: Status) -> None:
            if status.name not in tasks:
                tasks[status.name] = bars.add_task("", total=None, figures="", reason="")
            bars.update(
                tasks[status.name],
                description=printable(f"{status.name} {status.state}"),
                completed=status.done,
                total=status.total or None,
                figures=_figures(status),
                reason=printable(status.reason),
            )

        yield update


def _figures(status: Status) -> str:
    parts = [f"{size_text(status.done)} of {size_text(status.total)}"] if status.total else []
    if status.rate:
        parts.append(rate_text(status.rate))
    if status.eta_seconds is not None and status.rate:
        parts.append(duration_text(status.eta_seconds))
    return "  ".join(parts)
