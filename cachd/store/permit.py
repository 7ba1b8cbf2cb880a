"""Decides whether a pull may publish under its name, right before the name changes."""

from __future__ import annotations

import threading

from cachd.errors import Cancelled, InUse
from cachd.model import ModelSpec


class Permit:
    """One pull's permission to publish under its name. Safe from any thread.

    A name belongs to the model that it was first pulled for. `replace`: the request allows another model to
    take the name. `pins`: the same request pinned the name, so the pin does not stop this pull. `revoke` ends
    the permission when another pull replaces this one.
    """

    def __init__(self, *, replace: bool = False, pins: bool = False) -> None:
        self.replace, self.pins = replace, pins
        self.is_revoked = False
        self._is_used = False
        self._lock = threading.Lock()

    def revoke(self) -> bool:
        """Allow no publish from now on. Returns False if the publish has begun: it is then completed."""
        with self._lock:
            self.is_revoked = True
            return not self._is_used

    def use(self, owner: ModelSpec | None, asked: ModelSpec, *, is_pinned_elsewhere: bool = False) -> None:
        """Begin the publish of `asked` under its name.

        `owner`: the spec that has the name now; None if the name is free. Raises Cancelled if the permit was
        revoked. Without `replace`, raises InUse if the owner is another model; without `replace` or `pins`,
        also if the name is pinned to another snapshot or spec.
        """
        with self._lock:
            if self.is_revoked:
                raise replaced(asked)
            if owner is not None and not self.replace and not owner.is_of_same_model(asked):
                raise name_taken(asked, owner)
            if owner is not None and is_pinned_elsewhere and not (self.replace or self.pins):
                raise pinned(asked) if owner == asked else name_taken(asked, owner, "is pinned at")
            self._is_used = True


def replaced(asked: ModelSpec) -> Cancelled:
    """The error of a pull that another pull under the same name replaced."""
    return Cancelled(f"{asked.name}: the pull of {asked} was replaced by another", code="replaced")


def pinned(asked: ModelSpec, revision: str = "") -> InUse:
    """The refusal to move a pinned name to another revision of the same ref. `revision`: the pinned one."""
    at = f" at revision {revision}" if revision else ""
    return InUse(
        f"{asked.name} is pinned{at}, and {asked} may lead to another one by now",
        code="name_taken",
        hint=f"cachd unpin {asked.name}, then ask again; or move the pin, too: --replace (replace: true)",
    )


def name_taken(asked: ModelSpec, owner: ModelSpec, why: str = "is") -> InUse:
    """The refusal to give a name to `asked`. `why` connects the name and its owner in the message."""
    return InUse(
        f"{asked.name} {why} {owner}, but the request asks for {asked}",
        code="name_taken",
        hint="choose another name (--name), or replace the model of this name: --replace (replace: true)",
    )
