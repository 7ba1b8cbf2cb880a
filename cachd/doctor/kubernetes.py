"""Checks whether the service account has the rights that the signals of the options need."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from cachd.cluster.api_server import ApiServer
from cachd.cluster.node_events import NAMESPACE
from cachd.config import Config
from cachd.daemon.signals import place
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, ok

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_HINT = "grant it, as the chart's nodeSignals does, or turn the option off"


def check_kubernetes(config: Config, seconds: float) -> Iterator[Finding]:
    """Whether the API server answers, has this node, and allows every write. Raises Unavailable."""
    node = config.node_name
    if not config.informs_kubernetes or node is None:
        return
    server = ApiServer(place(config), seconds=seconds)
    server.get(f"/api/v1/nodes/{quote(node, safe='')}")
    refused = False
    for option, attributes in _rights(config, node):
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = server.ask(_REVIEWS, review)
        status = answer.get("status") if isinstance(answer, dict) else None
        if not isinstance(status, dict) or status.get("allowed") is not True:
            refused = True
            what = "/".join(filter(None, (attributes["resource"], attributes.get("subresource"))))
            found = f"the service account may not {attributes['verb']} {what}"
            yield Finding(Code.kubernetes, State.wrong, found, _HINT, subject=option)
    if not refused:
        yield ok(Code.kubernetes, f"the API server has this node, {node}, and allows what the options need")


def _rights(config: Config, node: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rights that the enabled options need, besides that to read the node."""
    patch = {"verb": "patch", "resource": "nodes", "name": node}
    if config.node_labels:
        yield "node_labels", patch
    if config.node_condition:
        yield "node_condition", patch | {"subresource": "status"}
    if config.node_events:
        for verb in ("create", "patch"):
            yield "node_events", {"verb": verb, "resource": "events", "namespace": NAMESPACE}
    if config.startup_taint:
        yield "startup_taint", patch
