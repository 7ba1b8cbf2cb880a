"""The part of the Kubernetes API that cachd speaks: one Node, its status, and Events, over TLS.

It keeps managedFields as a real API server does, so a server-side apply removes the labels that its manager
no longer names. `answer` replaces the answer to a request, or delays it.
"""

from __future__ import annotations

import copy
import http.server
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.ground.origin.certificates import Tls

Object = dict[str, Any]
TOKEN = "service-account"


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    method: str
    path: str
    kind: str
    token: str
    body: Any

    @property
    def is_write(self) -> bool:
        return self.method != "GET"


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, read and answered."""

    api: KubeApi

    def do_GET(self) -> None:
        self._do()

    def do_PATCH(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def _do(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, token = self.headers.get("Content-Type", ""), self.headers.get("Authorization", "")
        body = json.loads(content) if content else None
        call = Call(self.command, self.path, kind, token.removeprefix("Bearer "), body)
        with self.api.changed:
            self.api.calls.append(call)
            self.api.changed.notify_all()
        answer = self.api.answer
        if answer is None or not answer(self, call):
            self.say(*self.api.do(call))

    def say(self, status: int, document: Any, **headers: str) -> None:
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class KubeApi:
    """The API server, with the node `node`. A context manager. `place`: a directory for its certificate."""

    def __init__(self, place: Path, node: str = "gpu-7", taints: tuple[Object, ...] = ()) -> None:
        self.pem, self.name = place / "kubernetes.pem", node
        self.calls: list[Call] = []
        self.events: dict[str, Object] = {}
        self.answer: Callable[[Handler, Call], bool] | None = None
        self.changed = threading.Condition()
        self.tokens = {TOKEN}
        self.forbidden: set[str] = set()  # resources that a review says may not be changed
        self.token_file = place / "token"
        self.token_file.write_text(f"{TOKEN}\n")
        self.node: Object | None = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node, "uid": "uid-1", "labels": {"kubernetes.io/os": "linux"}},
            "spec": {"taints": list(taints)},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }
        handler = type("Answers", (Handler,), {"api": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        context = Tls().context(self.pem)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def options(self) -> Object:
        """Those with which a daemon finds this server and its node."""
        return {
            "node_name": self.name,
            "kubernetes_url": self.url,
            "kubernetes_token_file": str(self.token_file),
            "kubernetes_ca_file": str(self.pem),
        }

    @property
    def writes(self) -> list[Call]:
        return [call for call in self.calls if call.is_write]

    @property
    def labels(self) -> dict[str, str]:
        """Those below cachd's prefix."""
        assert self.node is not None
        found = self.node["metadata"]["labels"].items()
        return {key.partition("/")[2]: value for key, value in found if key.startswith("models.cachd.dev/")}

    @property
    def condition(self) -> Object:
        """The condition that cachd keeps; empty if there is none."""
        assert self.node is not None
        found = self.node["status"]["conditions"]
        return next((each for each in found if each["type"] == "CachdRequiredModelsReady"), {})

    @property
    def taints(self) -> list[str]:
        assert self.node is not None
        return [each["key"] for each in self.node["spec"]["taints"]]

    def do(self, call: Call) -> tuple[int, Object]:
        """Carry out a request: the status and the document of its answer."""
        split = urlsplit(call.path)
        if call.token not in self.tokens:
            return 401, {"kind": "Status", "message": "Unauthorized"}
        if split.path.startswith("/api/v1/namespaces/default/events"):
            return self._event(call, split.path.removeprefix("/api/v1/namespaces/default/events").strip("/"))
        if split.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = call.body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
            return 201, {"status": {"allowed": resource not in self.forbidden}}
        if self.node is None or not split.path.startswith(f"/api/v1/nodes/{self.name}"):
            return 404, {"kind": "Status", "message": "not found"}
        if call.method == "GET":
            return 200, self.node
        new = copy.deepcopy(self.node)
        manager = parse_qs(split.query)["fieldManager"][0]
        if split.path.endswith("/status"):
            self._patch_status(new, call)
        elif call.kind == "application/json-patch+json":
            if not self._patch(new, call.body):
                return 422, {"kind": "Status", "message": "the test failed"}
        else:
            assert call.kind == "application/apply-patch+yaml"
            self._apply(new, call.body, manager)
        self.node = new
        return 200, new

    def _apply(self, node: Object, body: Object, manager: str) -> None:
        assert body["metadata"]["uid"] == node["metadata"]["uid"]
        labels, managers = node["metadata"]["labels"], node["metadata"].setdefault("managedFields", [])
        mine = next((each for each in managers if each["manager"] == manager), None)
        if mine is None:
            mine = {"manager": manager, "operation": "Apply", "fieldsV1": {}}
            managers.append(mine)
        before = mine["fieldsV1"].get("f:metadata", {}).get("f:labels", {})
        wanted = body["metadata"]["labels"]
        for gone in {key.removeprefix("f:") for key in before} - wanted.keys():
            labels.pop(gone, None)
        labels.update(wanted)
        mine["fieldsV1"] = {"f:metadata": {"f:labels": {f"f:{key}": {} for key in wanted}}}

    def _patch_status(self, node: Object, call: Call) -> None:
        assert call.kind == "application/strategic-merge-patch+json"
        for each in call.body["status"]["conditions"]:
            others = [one for one in node["status"]["conditions"] if one["type"] != each["type"]]
            node["status"]["conditions"] = [*others, each]

    def _patch(self, node: Object, body: list[Object]) -> bool:
        for each in body:
            first, second, at = each["path"].strip("/").split("/")
            found = node[first].get(second, [])
            if each["op"] == "test" and (int(at) >= len(found) or found[int(at)] != each["value"]):
                return False
            if each["op"] == "remove":
                del found[int(at)]
        return True

    def _event(self, call: Call, name: str) -> tuple[int, Object]:
        if call.method == "POST":
            name = call.body["metadata"]["name"]
            if name in self.events:
                return 409, {"kind": "Status", "message": f"events {name} already exists"}
            self.events[name] = call.body
            return 201, call.body
        if name not in self.events:
            return 404, {"kind": "Status", "message": "not found"}
        self.events[name] = {**self.events[name], **call.body}
        return 200, self.events[name]
