"""Decides which labels the node gets for its models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from enum import IntEnum

from cachd.report.values import ModelState

PREFIX = "models.cachd.dev/"
LONGEST = 63  # characters of a label's name after its prefix, and of its value
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DIGITS = 12  # of the hash that makes a shortened name distinct


class Label(IntEnum):
    """The values of a label. Of two models with the same label, the lower value counts.

    `updating`: it is on its way, or will be. `failed`: its pull failed, or it is damaged or refused.
    """

    failed = 0
    updating = 1
    ready = 2


_OF_STATE = {
    ModelState.ready: Label.ready,
    ModelState.queued: Label.updating,
    ModelState.resolving: Label.updating,
    ModelState.waiting: Label.updating,
    ModelState.downloading: Label.updating,
    ModelState.publishing: Label.updating,
    ModelState.failed: Label.failed,
    ModelState.damaged: Label.failed,
    ModelState.refused: Label.failed,
}
_ARRIVES = (ModelState.downloading, ModelState.publishing)


def label_of(name: str) -> str:
    """The label of a model: its name if that is the name of a label, else a stable form of it with a hash."""
    if _LABEL.fullmatch(name):
        return f"{PREFIX}{name}"
    digits = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    begin = re.sub(r"[^A-Za-z0-9._-]", "-", name)[: LONGEST - _DIGITS - 1].strip("._-")
    return f"{PREFIX}{begin}-{digits}" if begin else f"{PREFIX}{digits}"


def labels(
    states: Mapping[str, ModelState],
    required: Collection[str],
    *,
    at_most: int,
    before: Mapping[str, str],
) -> dict[str, str]:
    """The labels for models in these states: of required models first, then of ready ones, then by name.

    `before`: the labels so far. A model that failed stays `failed` until bytes of another try arrive, so that
    a pull that fails again and again changes no label.
    """
    found: dict[str, tuple[bool, Label]] = {}
    for name in sorted(states):
        label, value = label_of(name), _OF_STATE.get(states[name])
        if value is None:
            continue
        if value is Label.updating and before.get(label) == "failed" and states[name] not in _ARRIVES:
            value = Label.failed
        is_required, other = found.get(label, (False, value))
        found[label] = (is_required or name in required, min(value, other))
    order = sorted(found, key=lambda label: (not found[label][0], -found[label][1], label))
    return {label: found[label][1].name for label in sorted(order[:at_most])}
