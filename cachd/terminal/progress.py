"""Draws progress bars on a terminal, and nothing in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cachd.errors import printable
from cachd.terminal.amounts import duration_text, progress_text, rate_text
from cachd.terminal.models import Status
from cachd.terminal.output import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_BAR_WIDTH = 20
Update = Callable[[Status], None]


@contextmanager
def progress_bars() -> Iterator[Update]:
    """Yields a function that shows how a model is now, in a bar of its own."""
    from rich.console import Console

    stderr = Console(stderr=True)
    if not stderr.is_terminal:
        yield lambda _: None
        return
    with _bars(stderr) as bars:
        tasks: dict[str, TaskID] = {}

        def update(status: Status) -> None:
            if status.name not in tasks:
                tasks[status.name] = bars.add_task("", total=None, figures="", reason="")
            # The command itself says why a pull failed.
            reason = "" if status.state == "failed" else status.reason
            bars.update(
                tasks[status.name],
                description=printable(f"{status.name} {status.state}"),
                completed=status.done,
                total=status.total or None,
                figures=_figures(status),
                reason=printable(reason),
            )

        yield update


def _bars(console: Console) -> Progress:
    """The bars, over all but the last columns of a terminal."""
    from rich import progress
    from rich.constrain import Constrain
    from rich.table import Column

    class Bars(progress.Progress):
        def get_renderables(self) -> Iterator[Constrain]:
            yield Constrain(self.make_tasks_table(self.tasks), console.width - len(INTERRUPTED))

    full, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Bars(
        progress.TextColumn("{task.description}", markup=False, table_column=full),
        progress.BarColumn(bar_width=_BAR_WIDTH),
        progress.TextColumn("{task.fields[figures]}", markup=False, table_column=full.copy()),
        progress.TextColumn("{task.fields[reason]}", markup=False, style="red", table_column=rest),
        console=console,
        expand=True,
    )


def _figures(status: Status) -> str:
    parts = [progress_text(status.done, status.total)] if status.total else []
    if status.rate:
        parts.append(rate_text(status.rate))
    if status.eta_seconds is not None and status.rate:
        parts.append(duration_text(status.eta_seconds))
    return "  ".join(parts)
