"""Whose disk it is, and what a kubelet keeps free of it."""

from __future__ import annotations

import http.server
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachd import config
from cachd.config import Config
from cachd.configz import configuration
from cachd.errors import Unavailable
from cachd.kubelet import is_used_by_node, thresholds, with_margin
from cachd.model import Percentage
from cachd.sources.kubernetes_place import Place
from tests.ground.node import Node
from tests.ground.origin.certificates import certify
from tests.ground.small import MIB, Disks, Engines

Nodes = Callable[..., Node]
CONFIGZ = {"kubeletconfig": {"evictionHard": {"nodefs.available": "22%"}, "imageGCHighThresholdPercent": 85}}
PATIENCE_SECONDS = 30.0


def options(**told: Any) -> Config:
    return config.load(root="/nowhere", **told)


def test_a_disk_that_the_node_uses_is_told_from_one_of_its_own(disk: Disks) -> None:
    assert is_used_by_node(Path("/etc"))
    assert not is_used_by_node(disk(MIB))


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("", (15, 5)),
        ("not: [yaml", (15, 5)),
        ("imageGCHighThresholdPercent: 70", (30, 5)),
        ("evictionHard: {nodefs.available: 25%, nodefs.inodesFree: 8%}", (25, 8)),
        ("evictionHard: {imagefs.available: 300Gi}", (30, 0)),
        ("evictionSoft: {nodefs.available: 40%}", (40, 5)),
        ("evictionHard: {nodefs.available: 25%, imagefs.available: 20%}", (25, 0)),
        ("evictionHard: {imagefs.available: 20%, nodefs.available: 25%}", (25, 0)),
        ("evictionHard: {nodefs.available: 40%}\nevictionSoft: {nodefs.available: 30%}", (40, 0)),
        ("evictionSoft: {nodefs.available: 30%, imagefs.available: 40%}", (40, 5)),
        ("imageGCHighThresholdPercent: 70\nevictionHard: {nodefs.available: 20%}", (30, 0)),
        ("imageGCHighThresholdPercent: 95", (15, 5)),
        ("imageGCHighThresholdPercent: 100\nevictionHard: {nodefs.available: 7%}", (7, 0)),
        ("imageGCHighThresholdPercent: 101", (15, 5)),
    ],
)
def test_the_kubelets_thresholds_are_read_from_its_file(
    tmp_path: Path, told: str, kept: tuple[float, float]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(told)
    found = thresholds(options(kubelet_config=str(file)), 1000 << 30)
    assert (found.available.percent, found.inodes.percent) == kept
    assert with_margin(found.available).percent == kept[0] + 5, "cachd stops before the kubelet begins"
    is_yaml = "[yaml" not in told
    assert (found.come_from.value, found.reason == "") == ("file" if is_yaml else "defaults", is_yaml)


@pytest.mark.parametrize("order", [(10, 30), (30, 10)], ids=str)
def test_of_two_thresholds_cachd_keeps_to_the_larger(order: tuple[int, int]) -> None:
    assert with_margin(*map(Percentage, order)) == Percentage(35)
    assert with_margin(Percentage(98)) == Percentage(100)


def test_without_the_kubelets_file_a_fifth_of_a_shared_disk_stays_free(tmp_path: Path) -> None:
    found = thresholds(options(kubelet_config=str(tmp_path / "absent")), 1 << 40)
    assert with_margin(found.available) == Percentage(20)
    assert (found.come_from.value, found.reason) == ("defaults", "")


def test_the_reserve_of_a_shared_disk_is_the_nodes_and_of_another_nothing(
    disk: Disks, engine: Engines, root: Path
) -> None:
    own = engine(root=disk(8 * MIB), reserve_free="auto").store.space.capacity()
    assert (own.reserve_free, own.reserve_inodes) == (0, 0)
    if not is_used_by_node(root):
        pytest.skip("the test's directory is on a disk of its own")
    shared = engine(root=root, reserve_free="auto").store.space.capacity()
    assert shared.reserve_free == shared.total // 5


# --- the option ---


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"nodefs.available": "8%"}, (8, 0)),
        ({"nodefs.available": "8%", "imagefs.available": "12%", "nodefs.inodesFree": "3%"}, (12, 3)),
        ({"imagefs.available": "100Gi"}, (10, 0)),
        ("nodefs.available=8%, nodefs.inodesFree=2%", (8, 2)),
    ],
    ids=str,
)
def test_thresholds_that_the_operator_states_go_before_all_others(
    tmp_path: Path, told: object, kept: tuple[float, float]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("evictionHard: {nodefs.available: 40%}")
    found = thresholds(options(kubelet_thresholds=told, kubelet_config=str(file)), 1000 << 30)
    assert (found.available.percent, found.inodes.percent) == kept
    assert (found.come_from.value, found.reason) == ("option", "")


@pytest.mark.parametrize("told", [{"memory.available": "1Gi"}, {"nodefs.available": "much"}], ids=str)
def test_a_threshold_that_is_none_is_refused(told: object) -> None:
    assert "kubelet_thresholds" in str(config.examine(kubelet_thresholds=told).findings[0])


# --- the kubelet ---


class Kubelets:
    """A server of /configz with TLS, and what it was asked."""

    def __init__(self, pem: Path, answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> None:
        asked = self.asked = []

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers["Authorization"]))
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        certify(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"

    asked: list[tuple[str, str]]


@contextmanager
def kubelet(pem: Path, answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[Kubelets]:
    one = Kubelets(pem, answer)
    thread = threading.Thread(target=one.server.serve_forever)
    thread.start()
    try:
        yield one
    finally:
        one.server.shutdown()
        one.server.server_close()
        thread.join()


def says(content: bytes, status: int = 200) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("service-account\n")
    return file


def told(one: Kubelets, token: Path, pem: Path) -> dict[str, Any]:
    return {"kubelet_url": one.url, "kubelet_token_file": str(token), "kubelet_ca_file": str(pem)}


def test_the_kubelet_is_asked_with_the_token_of_the_service_account(tmp_path: Path, token: Path) -> None:
    pem = tmp_path / "kubelet.pem"
    with kubelet(pem, says(json.dumps(CONFIGZ).encode())) as one:
        found = thresholds(options(**told(one, token, pem)), 1 << 40)
    assert one.asked == [("/configz", "Bearer service-account")]
    assert (found.available.percent, found.come_from.value, found.reason) == (22, "kubelet", "")


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"Forbidden (verb=get, resource=nodes, subresource(s)=[configz proxy])", 403, "it answered 403"),
        (b"{}", 200, "KeyError"),
        (b"[]", 200, "TypeError"),
        (b'{"kubeletconfig": 7}', 200, "AttributeError"),
        (b"no JSON", 200, "is not JSON"),
        (b'{"kubeletconfig": {"a": "' + b"x" * (2 << 20) + b'"}}', 200, "the limit is"),
        (b"[" * 1000, 200, "nested deeper"),
    ],
    ids=["refused", "no key", "a list", "a number", "no JSON", "too long", "too deep"],
)
def test_an_answer_that_is_none_leaves_the_defaults_and_a_reason(
    tmp_path: Path, token: Path, content: bytes, status: int, reason: str
) -> None:
    pem, absent = tmp_path / "kubelet.pem", str(tmp_path / "absent")
    with kubelet(pem, says(content, status)) as one:
        found = thresholds(options(**told(one, token, pem), kubelet_config=absent), 1 << 40)
    assert (found.available.percent, found.come_from.value) == (15, "defaults")
    assert reason in found.reason


def test_a_kubelet_that_another_authority_signed_is_not_shown_the_token(tmp_path: Path, token: Path) -> None:
    pem, other = tmp_path / "kubelet.pem", tmp_path / "other.pem"
    certify(other)
    with kubelet(pem, says(b"{}")) as one:
        found = thresholds(options(**told(one, token, other), kubelet_config=str(tmp_path / "no")), 1 << 40)
    assert one.asked == []
    assert "certificate" in found.reason


def test_a_kubelet_that_drips_is_waited_for_no_longer_than_the_deadline(tmp_path: Path, token: Path) -> None:
    pem, enough = tmp_path / "kubelet.pem", threading.Event()

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        while not enough.wait(0.05):
            handler.wfile.write(b"x")  # a status line without an end

    with kubelet(pem, drip) as one:
        began = time.monotonic()
        try:
            with pytest.raises(Unavailable, match=r"no answer within 0\.5 s") as refusal:
                configuration(Place(one.url, token, pem), seconds=0.5)
            assert refusal.value.code == "no_kubelet"
            assert time.monotonic() - began < PATIENCE_SECONDS
        finally:
            enough.set()


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://10.0.0.7:10250", ("10.0.0.7", 10250)),
        ("https://[fd00::7]:10250/", ("fd00::7", 10250)),
        ("https://fd00::7:10250", ("fd00::7", 10250)),
    ],
)
def test_the_address_of_a_node_may_be_of_either_family(url: str, place: tuple[str, int], token: Path) -> None:
    assert Place(url, token, token).address == place


def test_only_https_and_no_path_is_an_address_of_a_kubelet() -> None:
    for wrong in ("http://10.0.0.7:10250", "https://10.0.0.7", "https://10.0.0.7:10250/exec"):
        assert "kubelet_url" in str(config.examine(kubelet_url=wrong).findings[0])


def test_the_daemon_and_the_doctor_say_where_the_thresholds_come_from(
    tmp_path: Path, token: Path, node: Nodes
) -> None:
    pem = tmp_path / "kubelet.pem"
    with kubelet(pem, says(json.dumps(CONFIGZ).encode())) as one:
        running = node(reserve_free="auto", **told(one, token, pem))
        if not is_used_by_node(running.root):
            pytest.skip("the test's directory is on a disk of its own")
        found = running.ask("GET", "/v1/capacity").document["kubelet"]
        assert found == {
            "available_percent": 22,
            "inodes_percent": 0,
            "thresholds_from": "kubelet",
            "reason": None,
        }
        assert running.metric("cachd_kubelet_threshold_ratio", **{"from": "kubelet"}) == 0.22
    running.configure(**{**running.options, "kubelet_thresholds": {"nodefs.available": "9%"}})
    running.wait_for("configuration file taken over", options=["kubelet_thresholds"])
    found = running.ask("GET", "/v1/capacity").document["kubelet"]
    assert (found["available_percent"], found["thresholds_from"]) == (9, "option")
    examined = running.cli("doctor", "--config", str(running.config), "--root", str(running.root))
    assert re.search(r"kubelet +the kubelet acts below 9% \(kubelet_thresholds\)", examined.stdout)
