"""Makes the copies that the views show of some files, paid from the pull's reservation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from cachd.errors import NoSpace
from cachd.model import Manifest
from cachd.store.space import Reservation
from cachd.transfer.attempt import Attempt

_AGAIN_SECONDS = 0.2
_PATIENCE_SECONDS = 600.0  # for space that another process took from the reservation


def staged_copies(
    manifest: Manifest, attempt: Attempt, reservation: Reservation
) -> AbstractContextManager[None]:
    """A context in which the copies are ready for a publish. Entering it raises Cancelled or NoSpace."""
    pay = _payer(attempt, reservation)
    return attempt.context.store.copies.staged(manifest, attempt.spec.hub_folder, pay)


def _payer(attempt: Attempt, reservation: Reservation) -> Callable[[int], AbstractContextManager[None]]:
    cancel_token, clock = attempt.progress.cancel_token, attempt.context.clock

    @contextmanager
    def pay(count: int) -> Iterator[None]:
        cancel_token.check()
        deadline = clock() + _PATIENCE_SECONDS
        while True:
            with reservation.grant(count, count) as granted:
                if granted:
                    yield
                    return
            if clock() >= deadline:
                raise NoSpace(
                    f"{attempt.spec.name}: no space for {count} bytes of a copy for the views",
                    hint="free space on the cache's file system",
                    short=count,
                )
            cancel_token.wait(_AGAIN_SECONDS)

    return pay
