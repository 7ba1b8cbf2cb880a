"""Says why a model is not ready, and whether waiting for it may help."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cachd.errors import CachdError, Unavailable
from cachd.report.models import Models, unknown_model
from cachd.report.values import ErrorReport, ModelState, error_report
from cachd.transfer.progress import Progress
from cachd.transfer.request import Pull

RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class NotReady:
    """The reason why a name is not ready.

    `error`: what the API answers. If the pull failed for good, it has the class of that failure, which
    decides the HTTP status. Otherwise it is Unavailable, or NotFound for an unknown name. `state`: None for
    an unknown name. `is_final`: waiting is pointless until somebody asks for the model again. `failure`: the
    error of the last pull, if it failed. `eta_seconds`: seconds until the last byte, None if unknown.
    """

    error: CachdError
    state: ModelState | None
    is_final: bool = False
    failure: ErrorReport | None = None
    eta_seconds: float | None = None


def why_not_ready(name: str, models: Models) -> NotReady:
    """The reason why a name is not ready."""
    pull, state, failure = models.pulls.get(name), models.state(name), models.failure(name)
    damage, failed = models.store.names.quarantine_of(name), error_report(failure)
    if failure is not None and models.is_final(name):
        detail = f"{name} is not ready ({state}): {failure.detail}"
        return NotReady(replace(failure, detail=detail), state, is_final=True, failure=failed)
    if damage and state is ModelState.damaged:
        detail = f"{name} is damaged ({damage.reason}){_repair(pull)}"
        waits = Unavailable(detail, code="damaged", retry_after=RETRY_SECONDS)
        return NotReady(waits, state, failure=failed)
    if pull is None:
        return NotReady(unknown_model(name), None)
    if failure is not None:
        error = Unavailable(
            f"{name} is not ready ({state}): {failure.detail}",
            code=failure.code,
            hint=failure.hint,
            retry_after=RETRY_SECONDS,
        )
        return NotReady(error, state, failure=failed)
    return _on_its_way(name, pull.progress)


def _repair(pull: Pull | None) -> str:
    """How far the repair of a damaged model is, for people."""
    if pull is None or pull.done.done():
        failed = f"; its last repair failed: {pull.error.detail}" if pull and pull.error else ""
        return f" and waits to be repaired{failed}"
    progress = pull.progress
    return f", and its repair is {progress.state}: {progress.done} of {progress.total} bytes are here"


def _on_its_way(name: str, progress: Progress) -> NotReady:
    """The reason while a pull runs: how far it is, and when to ask again."""
    now = progress.now
    eta = progress.eta_seconds(now)
    error = Unavailable(
        f"{name} is {progress.state}: {now.done} of {progress.total} bytes",
        code="not_ready",
        retry_after=min(RETRY_SECONDS if eta is None else eta, _LONGEST_RETRY_SECONDS),
        bytes_done=now.done,
        bytes_total=progress.total,
    )
    return NotReady(error, ModelState(progress.state), eta_seconds=eta)
