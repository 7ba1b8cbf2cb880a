"""Waits for a model to become ready in the mount of a pod."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cachd.errors import NotKnown, WaitTimeout, error_of
from cachd.model import check_name
from cachd.pod.mount import Mount

_CHECK_SECONDS = 0.25  # between two checks whether a model is ready
_REPORT_SECONDS = 10.0  # between two lines of progress
_STALE_SECONDS = 30.0
_UNDER_WAY = ("resolving", "downloading", "publishing")
Report = Callable[[str], None]


class Patience:
    """How long to wait for one model.

    `seconds`: for the model. `unknown_seconds`: for this node to learn of the model. `report` gets a line of
    progress for people at most every ten seconds.
    """

    def __init__(
        self,
        mount: Mount,
        name: str,
        *,
        seconds: float,
        unknown_seconds: float,
        report: Report,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._mount, self._name, self._report = mount, check_name(name), report
        self._seconds, self._unknown_seconds = seconds, min(unknown_seconds, seconds)
        self._clock, self._now = clock, now
        self._began, self._said = clock(), ("", -_REPORT_SECONDS)

    def pause(self, why: str = "") -> None:
        """Sleep until the next check.

        Raises the error of a pull that failed for good, NotKnown when this node did not learn of the model in
        time, or WaitTimeout. `why` states the cause of the wait when it is not the pull.
        """
        status, waited = self._mount.status(self._name), self._clock() - self._began
        failed = status.get("error")
        if status.get("final") is True and isinstance(failed, dict) and not why:
            raise error_of(failed)
        known = bool(why or status or self._mount.layout.ready_file(self._name).exists())
        if not known and waited >= self._unknown_seconds:
            raise NotKnown(
                f"no cachd on this node knows {self._name} after {waited:.0f} s: it has no file in"
                f" {self._mount.layout.root}/ready or {self._mount.layout.root}/status",
                hint="list the model in the configuration (models:), or pull it; check that this directory is"
                " the root of the cache",
            )
        state = why or _state(status, self._now())
        if waited >= self._seconds:
            raise WaitTimeout(
                f"{self._name} is not ready after {waited:.0f} s: {state}", hint="wait longer (--timeout)"
            )
        self._say(f"waiting for {self._name}: {state}", waited)
        left = [limit - waited for limit in (self._seconds, self._unknown_seconds) if limit > waited]
        time.sleep(min(_CHECK_SECONDS, *left))

    def _say(self, line: str, now: float) -> None:
        said, at = self._said
        if line != said and now - at >= _REPORT_SECONDS:
            self._report(line)
            self._said = line, now


def wait_until_ready(mount: Mount, name: str, patience: Patience) -> Path:
    """Wait until the model is ready. Returns its path in the mount. Raises as Patience.pause."""
    while mount.snapshot(name) is None:
        patience.pause()
    return mount.layout.model(name)


def _state(status: Mapping[str, Any], now: float) -> str:
    """The state and progress of a model, for people. `now`: seconds since the epoch."""
    text = str(status.get("state", "not known on this node yet"))
    size, failed = status.get("bytes"), status.get("error")
    if isinstance(size, dict) and size.get("total"):
        text += f", {size.get('done')} of {size['total']} bytes"
    if isinstance(failed, dict):
        text += f" ({failed.get('detail')})"
    waits = status.get("waits")
    if isinstance(waits, dict) and waits.get("reason"):
        text += f", waits ({waits['reason']}{f': {d}' if (d := waits.get('detail')) else ''})"
    return text[:1000] + _age(status, now)


def _age(status: Mapping[str, Any], now: float) -> str:
    """How old the status of a pull under way is, once it is old enough for doubts whether a daemon runs."""
    if status.get("state") not in _UNDER_WAY:
        return ""
    try:
        age = now - datetime.fromisoformat(str(status.get("updated_at"))).timestamp()
    except ValueError:
        return ""
    if age < _STALE_SECONDS:
        return ""
    return f"; nothing has changed for {age:.0f} s: check that cachd runs on this node"
