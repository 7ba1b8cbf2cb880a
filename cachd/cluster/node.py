"""Compares this node's object in Kubernetes with the wanted one, and makes the patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachd.cluster.api_server import Patch
from cachd.cluster.labels import PREFIX
from cachd.metrics import Signal

FIELD_MANAGER = "cachd"
CONDITION = "CachdRequiredModelsReady"
_LABELS = "f:metadata", "f:labels"
_SHOWN = 5  # names of models in a message


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of the node: whether all required models are ready."""

    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """The labels and the condition that the node should have, and the key of the taint to remove.

    cachd does not change a part that is None.
    """

    labels: Mapping[str, str] | None = None
    condition: Condition | None = None
    taint: str | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """One patch of the node's object. `path` is below that of the node."""

    signal: Signal
    path: str
    kind: Patch
    body: object


@dataclass(frozen=True, slots=True)
class Observed:
    """The node's object as the API server has it.

    `labels`: those below the prefix. `owned`: the labels that cachd set, as the server keeps record of it.
    """

    uid: str
    labels: Mapping[str, str]
    owned: frozenset[str]
    conditions: Sequence[Mapping[str, Any]]
    taints: Sequence[Mapping[str, Any]]

    @classmethod
    def parse(cls, document: Any) -> Observed:
        """The parts of a Node that cachd reads. Raises ValueError if it is none."""
        try:
            metadata, spec, status = document["metadata"], document["spec"], document["status"]
            labels = metadata.get("labels") or {}
            return cls(
                uid=_text(metadata["uid"]),
                labels={key: _text(value) for key, value in labels.items() if key.startswith(PREFIX)},
                owned=frozenset(_owned(metadata.get("managedFields") or [])),
                conditions=[dict(each) for each in status.get("conditions") or []],
                taints=[dict(each) for each in spec.get("taints") or []],
            )
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError("the answer of the API server is no Node") from error

    @property
    def condition(self) -> Mapping[str, Any]:
        """The condition that cachd sets; empty if there is none."""
        return next((each for each in self.conditions if each.get("type") == CONDITION), {})


def writes(observed: Observed, wanted: Wanted, now: str) -> Iterator[Write]:
    """Yields the patches from the observed object to the wanted one. `now`: an RFC 3339 time."""
    manager = f"?fieldManager={FIELD_MANAGER}"
    if wanted.labels is not None and not _has_labels(observed, wanted.labels):
        # With the uid, the server refuses to make a node that is gone.
        metadata = {"uid": observed.uid, "labels": dict(wanted.labels)}
        body: object = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        yield Write(Signal.labels, f"{manager}&force=true", Patch.apply, body)
    if wanted.condition is not None and not _has_condition(observed, wanted.condition):
        conditions = [_condition(observed, wanted.condition, now)]
        body = {"metadata": {"uid": observed.uid}, "status": {"conditions": conditions}}
        yield Write(Signal.condition, f"/status{manager}", Patch.strategic, body)
    if wanted.taint is not None and (body := list(_without(observed.taints, wanted.taint))):
        yield Write(Signal.taint, manager, Patch.json, body)


def condition(required: Mapping[str, bool], *, is_configuration_right: bool) -> Condition:
    """The condition of a node. `required`: whether each required model is ready, by name."""
    absent = sorted(name for name, is_ready in required.items() if not is_ready)
    if not is_configuration_right:
        what = "the configuration file is wrong, so the list of required models may be an older one"
        return Condition("Unknown", "ConfigurationRefused", what)
    if not required:
        return Condition("True", "NoRequiredModels", "the configuration marks no model as required")
    if not absent:
        return Condition("True", "RequiredModelsReady", f"required models that are ready: {len(required)}")
    more = f", and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    what = f"required models that are not ready: {', '.join(absent[:_SHOWN])}{more}"
    return Condition("False", "RequiredModelsNotReady", what)


def _has_labels(observed: Observed, wanted: Mapping[str, str]) -> bool:
    is_there = all(observed.labels.get(key) == value for key, value in wanted.items())
    return is_there and observed.owned == wanted.keys()


def _has_condition(observed: Observed, wanted: Condition) -> bool:
    found = observed.condition
    return (found.get("status"), found.get("reason"), found.get("message")) == (
        wanted.status,
        wanted.reason,
        wanted.message,
    )


def _condition(observed: Observed, wanted: Condition, now: str) -> dict[str, Any]:
    is_same = observed.condition.get("status") == wanted.status
    return {
        "type": CONDITION,
        "status": wanted.status,
        "reason": wanted.reason,
        "message": wanted.message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": (is_same and observed.condition.get("lastTransitionTime")) or now,
    }


def _without(taints: Sequence[Mapping[str, Any]], key: str) -> Iterator[dict[str, object]]:
    """Remove every taint with this key, last one first. If the list changed meanwhile, nothing happens."""
    for at in reversed(range(len(taints))):
        if taints[at].get("key") == key:
            path = f"/spec/taints/{at}"
            yield {"op": "test", "path": path, "value": taints[at]}
            yield {"op": "remove", "path": path}


def _owned(managers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in managers:
        if (each.get("manager"), each.get("operation")) != (FIELD_MANAGER, "Apply"):
            continue
        fields: Any = each.get("fieldsV1") or {}
        for name in _LABELS:
            fields = fields.get(name) or {}
        yield from (key.removeprefix("f:") for key in fields if key != ".")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
