"""Describes one request to make a model ready."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from urllib.parse import urlsplit

from structlog.contextvars import get_contextvars

from cachd.errors import CachdError, Cancelled, Changed
from cachd.model import Manifest, ModelSpec, Ref, Snapshot
from cachd.store.permit import Permit
from cachd.transfer.progress import Progress, State
from cachd.transfer.streams import StreamQuota

Outcome = Snapshot | CachdError


class Pull:
    """A pull: what is asked for, how far it is, and how it ended. `Progress` draws its states.

    `done` resolves to the snapshot, or raises the CachdError. `error` is that error, once the pull has failed
    or was cancelled. `asked_by` is the `who` of the log where the pull is made: the name of a caller's token,
    or `cachd:` and a part of cachd. `after`: the failed pull that it retries; `retries` counts them in a row.
    `retry_at`: when the daemon asks again for a pull that failed (Unix time); None if it does not. `joins`:
    how many requests have joined it. `awaited_since`: when somebody first asked whether its model is ready
    (monotonic); None if nobody has.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        priority: int = 0,
        replace: bool = False,
        pins: bool = False,
        after: Pull | None = None,
    ) -> None:
        self.spec = spec
        self.permit = Permit(replace=replace, pins=pins)
        self.progress = Progress()
        self.quota = StreamQuota(priority)
        self.error: CachdError | None = None
        self.done: Future[Snapshot] = Future()
        self.done.set_running_or_notify_cancel()  # so that no waiter can cancel the future
        self.scheme, self.host, self.priority = spec.ref.scheme, _host(spec.ref), priority
        self.asked_by = str(get_contextvars().get("who", "cachd"))
        self.began: float | None = None  # monotonic clock
        self.began_at: float | None = None  # seconds since the epoch, as ended_at
        self.ended_at: float | None = None
        self.failed_resolves = 0
        self.retries: int = after.retries + 1 if after else 0
        self.retry_at: float | None = None
        self.joins = 0
        self.awaited_since: float | None = None
        self._refusal: CachdError | None = None

    def note_join(self, *, pins: bool) -> None:
        """Note that another request has joined it. `pins`: that caller pins the name."""
        self.joins += 1
        self.permit.pins |= pins

    @classmethod
    def failed(cls, spec: ModelSpec, error: CachdError) -> Pull:
        """A pull that has ended with this error."""
        pull = cls(spec)
        pull.end(State.failed, error)
        pull.wake(error)
        return pull

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody has asked for its end."""
        return self.progress.cancel_token.is_cancelled

    def cancel(self) -> None:
        """Ask for its end, without waiting."""
        self.progress.cancel_token.cancel()

    def refuse_by(self, check: Callable[[Manifest], None]) -> None:
        """End it as failed with the CachdError that `check` raises for its manifest, if it raises one."""
        try:
            check(self.progress.manifest) if self.progress.manifest else None
        except CachdError as refusal:
            self._refusal = refusal
            self.cancel()

    def failure(self, error: CachdError) -> tuple[State, CachdError]:
        """How an attempt that raised `error` ends the pull: the final state, and the error to show."""
        if self._refusal is not None:
            return State.failed, self._refusal
        return State.cancelled if self.is_cancelled else State.failed, error

    @property
    def may_be_retried(self) -> bool:
        """Whether it failed for a reason that may pass without anybody's help."""
        if self.progress.state is not State.failed or self.error is None:
            return False
        # A source that changed twice during one pull is likely to do so again.
        return self.error.retryable and not isinstance(self.error, Changed)

    def cancelled(self) -> Cancelled:
        """The error of a pull that was cancelled while it had no slot."""
        when = "while it waited" if self.began else "before it began"
        return Cancelled(f"{self.spec.name}: cancelled {when}")

    def end(self, state: State, outcome: Outcome) -> None:
        """Show the pull as ended. Its waiters wait until `wake`."""
        if isinstance(outcome, CachdError):
            # The traceback's frames would keep the pull's memory alive.
            outcome.__traceback__ = outcome.__cause__ = outcome.__context__ = None
            self.error = outcome
        self.progress.end(state)  # after the error, so that a reader of a failed state finds its error

    def wake(self, outcome: Outcome) -> None:
        """Give the outcome to everybody who waits for `done`."""
        if isinstance(outcome, CachdError):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


def _host(ref: Ref) -> str:
    """What pulls with the same origin have in common: host and port of a web server; else the scheme."""
    return urlsplit(ref.base).netloc or ref.scheme if ref.scheme in ("http", "https") else ref.scheme
