"""Leave to publish under a name, given when a pull is admitted and looked at again before its name moves."""

from __future__ import annotations

import threading

from cachd.errors import Cancelled, InUse
from cachd.model import ModelSpec


class Permit:
    """A name belongs to the model it was first asked for. `replace`: somebody said that it may move all the
    same. `pins`: whoever asked for this pull asked for the pin, too, which is so no reason against it. Taken
    back by `revoke` when another pull takes the place of this one.
    """

    def __init__(self, *, replace: bool = False, pins: bool = False) -> None:
        self.replace, self.pins = replace, pins
        self.is_revoked = False
        self._is_used = False
        self._lock = threading.Lock()

    def revoke(self) -> bool:
        """Let nothing be published from now on; False when a publish has begun, which nothing stops."""
        with self._lock:
            self.is_revoked = True
            return not self._is_used

    def use(self, owner: ModelSpec | None, asked: ModelSpec, *, is_pinned_elsewhere: bool = False) -> None:
        """Raises Cancelled when it was taken back, InUse when the name came to be another model's, or to be
        pinned while it leads elsewhere."""
        with self._lock:
            if self.is_revoked:
                raise replaced(asked)
            if owner is not None and not self.replace and not owner.is_of_same_model(asked):
                raise name_taken(asked, owner)
            if owner is not None and is_pinned_elsewhere and not (self.replace or self.pins):
                raise name_taken(asked, owner, "is pinned at")
            self._is_used = True


def replaced(asked: ModelSpec) -> Cancelled:
    return Cancelled(f"{asked.name}: the pull of {asked} was replaced by another", code="replaced")


def name_taken(asked: ModelSpec, owner: ModelSpec, why: str = "is") -> InUse:
    """The refusal to move a name; `why` is what stands between the name and its owner in a sentence."""
    return InUse(
        f"{asked.name} {why} {owner}, and {asked} was asked for",
        code="name_taken",
        hint="give it another name (--name), or move this one: --replace (replace: true)",
    )
