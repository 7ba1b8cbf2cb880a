"""The origin that holds back gives what it says: ratios only, whatever the machine."""

from __future__ import annotations

import http.client
import itertools
import statistics
import threading
import time
from pathlib import Path

import pytest

from bench.pacing import MB, Pace, Paced, paced

pytestmark = pytest.mark.alone("measures a link's speed")
CONNECTIONS = (1, 2, 4)
STRETCHES, STRETCH_SECONDS = 5, 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("web")
    (place / "small").write_bytes(bytes(range(256)))
    with (place / "large").open("wb") as file:
        file.truncate(1 << 30)
    return place


def asked(origin: Paced, path: str, method: str = "GET", **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(origin.url.removeprefix("http://"), timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    return connection


def rate(origin: Paced, connections: int) -> float:
    """Bytes a second by the origin's own record, once all connections are at work.

    The median of some stretches: the machine may stand still for one, and what a link lost is not sent later.
    """
    began = time.monotonic()
    until = began + (1 + STRETCHES) * STRETCH_SECONDS

    def read() -> None:
        connection = asked(origin, "/large")
        answer = connection.getresponse()
        while time.monotonic() < until:
            answer.read(1 << 16)
        connection.close()

    threads = [threading.Thread(target=read) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = began + STRETCH_SECONDS
    busy = [s for s in origin.record() if s.connections == connections and s.seconds > started]
    stretches = itertools.pairwise(busy[:: len(busy) // STRETCHES])
    return statistics.median((b.sent - a.sent) / (b.seconds - a.seconds) for a, b in stretches)


def test_connections_add_up_until_the_link_is_full(directory: Path) -> None:
    pace = Pace(connection=4 * MB, link=8 * MB)
    with paced(directory, pace) as origin:
        one, two, four = (rate(origin, count) for count in CONNECTIONS)
    assert [two / one, four / one] == pytest.approx([2, 2], rel=0.15)


def test_a_crowd_makes_the_whole_link_slower(directory: Path) -> None:
    pace = Pace(connection=4 * MB, link=8 * MB, crowd=2, loss=0.3)
    with paced(directory, pace) as origin:
        two, four = (rate(origin, count) for count in CONNECTIONS[1:])
    assert four / two == pytest.approx(0.49, rel=0.15)
    assert pace.best == pace.total(2)


def test_one_connection_is_asked_again_and_again(directory: Path) -> None:
    with paced(directory, Pace(late_seconds=0)) as origin:
        connection = asked(origin, "/small", "HEAD")
        head = connection.getresponse()
        head.read()
        etag = head.headers["ETag"]
        assert (head.status, head.headers["Content-Length"]) == (200, "256")
        answers = []
        for headers in ({"Range": "bytes=2-5", "If-Match": etag}, {"If-Match": '"other"'}, {}):
            connection.request("GET", "/small", headers=headers)
            answer = connection.getresponse()
            answers.append((answer.status, answer.read(), answer.headers["Content-Range"]))
        connection.request("GET", "/none")
        answers.append((connection.getresponse().status, b"", None))
        connection.close()
    assert answers == [
        (206, b"\2\3\4\5", "bytes 2-5/256"),
        (412, b"", None),
        (200, bytes(range(256)), None),
        (404, b"", None),
    ]


def test_every_answer_is_late(directory: Path) -> None:
    late = 0.1
    with paced(directory, Pace(late_seconds=late)) as origin:
        began = time.perf_counter()
        connection = asked(origin, "/small", Range="bytes=0-0")
        connection.getresponse().read()
        connection.close()
        assert time.perf_counter() - began >= late
