"""What comes in over the API, made up from its own document and by hand: never more than a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.ground.chance import FACTOR, examples
from tests.ground.hub import Hub
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, said
from tests.ground.values import hostile
from tests.test_refs import typed_texts

CALLS = [
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/capacity"),
    ("GET", "/v1/limits"),
    ("PUT", "/v1/limits"),
    ("GET", "/v1/models"),
    ("POST", "/v1/models"),
    ("POST", "/v1/resolve"),
    ("POST", "/v1/preflight"),
    ("GET", "/v1/models/{name}"),
    ("DELETE", "/v1/models/{name}"),
    ("GET", "/v1/models/{name}/files"),
    ("GET", "/v1/models/{name}/preflight"),
    ("GET", "/v1/models/{name}/ready"),
    ("DELETE", "/v1/models/{name}/pull"),
    ("PUT", "/v1/models/{name}/pin"),
    ("DELETE", "/v1/models/{name}/pin"),
    ("POST", "/v1/models/{name}/rollback"),
    ("POST", "/v1/models/{name}/verify"),
    ("POST", "/v1/models/{name}/warm"),
    ("POST", "/v1/models/{name}/leases"),
    ("PUT", "/v1/models/{name}/leases/{lease}"),
    ("DELETE", "/v1/models/{name}/leases/{lease}"),
    ("GET", "/v1/options"),
    ("GET", "/v1/sources"),
    ("GET", "/v1/events"),
    ("GET", "/v1/evictions"),
    ("POST", "/v1/evictions"),
    ("POST", "/v1/sweeps"),
    ("GET", "/v1/scrubs"),
]
TAKES_WRONG = {  # where the document rules something out; what names a model is judged by 400 and 404
    ("GET", "/readyz"),
    ("PUT", "/v1/limits"),
    ("POST", "/v1/models"),
    ("POST", "/v1/resolve"),
    ("POST", "/v1/preflight"),
    ("GET", "/v1/models/{name}/files"),
    ("DELETE", "/v1/models/{name}"),
    ("GET", "/v1/models/{name}/ready"),
}
TOP_LEVEL = {"models", "hub", "ready", "status", "cache", ".cachd", "CACHEDIR.TAG"}
Alone = Callable[..., Ground]
GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
DOCUMENTED = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon for generated requests alone: its Hub knows nothing, and nothing else is within reach."""
    with (
        Hub() as hub,
        Node(tmp_path_factory.mktemp("fuzzed") / "node", {"hf_endpoint": hub.url, "allow": []}) as node,
    ):
        yield node


def is_problem(status: int, content_type: str, told: Any) -> bool:
    """Whether an answer is a problem document (RFC 9457) about its own status, with a code and a detail."""
    if content_type != "application/problem+json":
        return False
    return told["status"] == status and bool(told["title"] and told["code"] and told["detail"])


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*call, GOOD) for call in CALLS] + [(*call, BAD) for call in sorted(TAKES_WRONG)],
    ids=str,
)
def test_only_documented_answers_and_problem_documents_come_out(
    fuzzed: Node, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(fuzzed.ask("GET", "/openapi.json").document)
    schema.config.update(base_url=fuzzed.url)
    outside = {place.name for place in fuzzed.root.parent.iterdir()}
    takes_input = "{" in path or method in ("POST", "PUT")

    with requests.Session() as session:

        @settings(
            max_examples=(15 if takes_input else 3) * FACTOR,
            derandomize=FACTOR == 1,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(schema[path][method].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if path == "/v1/events":  # a stream would have no end
                case.query = {**(case.query or {}), "follow": "false"}
            answer = case.call(session=session, timeout=PATIENCE_SECONDS)
            assert answer.status_code != 500, answer.text
            content_type = answer.headers["content-type"][0] if answer.status_code >= 400 else ""
            assert answer.status_code < 400 or is_problem(answer.status_code, content_type, answer.json()), (
                answer.text
            )
            case.validate_response(answer, checks=DOCUMENTED)

        ask()
    assert {place.name for place in fuzzed.root.parent.iterdir()} == outside
    assert fuzzed.ask("GET", "/livez").status == 200
    assert "a request failed in a way it should not" not in fuzzed.output


def test_every_call_of_the_document_is_tried(fuzzed: Node) -> None:
    document = fuzzed.ask("GET", "/openapi.json").document
    calls = {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}
    assert calls == set(CALLS)


@examples(40)
@given(typed_texts, st.none() | hostile)
def test_no_hostile_ref_or_name_ends_in_more_than_a_refusal(fuzzed: Node, ref: str, name: str | None) -> None:
    asked = {"ref": ref, "name": name} if name is not None else {"ref": ref}
    answer = fuzzed.ask("POST", "/v1/models", asked)
    told = is_problem(answer.status, said(answer, "Content-Type"), answer.document)
    assert answer.status in (200, 202) or told, answer
    assert answer.status < 500
    assert {place.name for place in fuzzed.root.iterdir()} <= TOP_LEVEL


def test_a_thousand_equal_requests_are_one_pull_and_one_transfer(alone: Alone) -> None:
    ground = alone()
    ref = ground.add("wished.bin", MIB)
    hold = ground.origin.hold("/wished.bin", after=1000)
    asked = {"ref": ref, "name": "wished"}
    try:
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: ground.node.ask("POST", "/v1/models", asked), range(1000)))
    finally:
        hold.release()
    assert {(a.status, said(a, "Location")) for a in answers} == {(202, "/v1/models/wished")}
    assert ground.node.ready("wished").status == 200
    assert ground.node.metric("cachd_misses_total") == 1
    assert ground.origin.bytes_sent() == MIB
    assert ground.node.pull(ref, name="wished").status == 200


# A resolver that answers once with an address that is allowed, then with one that is not; a server at each
# that says its own address. Alone in a network and a mount namespace.
REBOUND = """
import socket, struct, threading
from fcntl import ioctl

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:  # SIOCSIFFLAGS: up and running
    ioctl(plain, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
asked, reached = [], []

def resolve(on):
    while True:
        query, client = on.recvfrom(512)
        end = query.index(b"\\0", 12) + 5
        kind = query[end - 4 : end - 2]
        answers = b""
        if kind == b"\\0\\1":
            address = "127.0.0.2" if not asked else "127.0.0.3"
            asked.append(address)
            answers = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4" + socket.inet_aton(address)
        head = query[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if answers else b"\\0\\0") + b"\\0\\0\\0\\0"
        on.sendto(head + query[12:end] + answers, client)

def serve(on):
    while True:
        connection, _ = on.accept()
        reached.append(on.getsockname()[0])
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")

resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
resolver.bind(("127.0.0.1", 53))
threading.Thread(target=resolve, args=(resolver,), daemon=True).start()
for address in ("127.0.0.2", "127.0.0.3"):
    listening = socket.create_server((address, 8080))
    threading.Thread(target=serve, args=(listening,), daemon=True).start()

from cachd.errors import Forbidden
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.http import Http
from cachd.sources.cancel import CancelToken
from cachd.sources.trust import Authorities

http = Http(AddressPolicy(["127.0.0.2/32"]), authorities=Authorities(None))
assert http.read("http://rebound.test:8080/x", CancelToken(), at_most=9) == b"ok"
assert reached == ["127.0.0.2"] and asked == ["127.0.0.2"], (reached, asked)
try:
    http.read("http://rebound.test:8080/x", CancelToken(), at_most=9)
except Forbidden as refusal:
    assert refusal.code == "private_address", refusal
else:
    raise AssertionError("the second address was connected to")
assert reached == ["127.0.0.2"] and asked[1:] == ["127.0.0.3"], (reached, asked)
"""


@needs("networks")
def test_a_name_that_is_rebound_leads_nowhere_that_was_not_vetted(tmp_path: Path) -> None:
    resolvers = tmp_path / "resolv.conf"
    resolvers.write_text("nameserver 127.0.0.1\noptions attempts:1 timeout:5\n")
    inside = f'mount --bind "{resolvers}" /etc/resolv.conf && exec "{sys.executable}" -c "$1"'
    namespaces = ["unshare", "-Urmn"] if os.geteuid() else ["unshare", "-mn"]
    ended = subprocess.run(
        [*namespaces, "sh", "-c", inside, "sh", REBOUND], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
