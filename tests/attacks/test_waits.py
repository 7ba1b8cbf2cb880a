"""Origins that keep cachd waiting: however they do, a cancel, a stop and other pulls are served."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Cancelled, Unavailable
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.patience import Patience
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import Address, dial
from cachd.sources.failures import requested_wait, retry_after
from cachd.sources.http import Http
from cachd.sources.http1 import Request
from cachd.sources.names import MAX_LEFT, Names
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from cachd.transfer.slots import SlotQueue
from tests.conftest import Engine, spec_of
from tests.ground.bucket import Bucket
from tests.ground.hub import EVERY_METHOD, Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Fault, Late, Origin, Reply, Seen, Status, Trickle
from tests.ground.scripted import Scripted, black_hole, heard
from tests.ground.site import until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
PROMPT_SECONDS = 8.0  # on a busy machine; an origin is waited for for 30 seconds, a pull's thread for 10
LONG_AGO = {"Retry-After": "1000000000"}
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDSCRIPTED",
    "AWS_SECRET_ACCESS_KEY": "said to nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Engines = Callable[..., Engine]


def dripping(connection: socket.socket, _: int) -> None:
    """An answer's head, a byte in two seconds."""
    stopped = threading.Event()
    heard(connection)
    for letter in itertools.chain(b"HTTP/1.1 200 OK\r\nX: ", itertools.repeat(120)):
        connection.sendall(bytes([letter]))
        stopped.wait(2)


def silent(connection: socket.socket, _: int) -> None:
    """Nothing, until the client goes."""
    while connection.recv(65536):
        pass


class EndlessPages(Fault):
    """A listing of which every page leads to another one."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        number = next(self._numbers)
        body = (
            f"<ListBucketResult><IsTruncated>true</IsTruncated>"
            f"<NextContinuationToken>{number}</NextContinuationToken>"
            f"<Contents><Key>elsewhere/{number}</Key><ETag>one</ETag><Size>1</Size></Contents>"
            f"</ListBucketResult>"
        )
        return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


@dataclass
class Kept:
    """A pull that its origin keeps waiting: its ref, the options to reach it, and whether it waits there."""

    ref: str
    arrived: Callable[[Node], bool]
    options: dict[str, object] = field(default_factory=dict)


def shows(name: str, *wanted: tuple[str, object]) -> Callable[[Node], bool]:
    """Whether a node's pull of the name says all of this."""

    def told(node: Node) -> bool:
        pull = node.ask("GET", f"/v1/models/{name}").document["pull"]
        return all(
            (pull[key] or {}).get("reason") == value if key == "waits" else pull[key] == value
            for key, value in wanted
        )

    return told


@contextmanager
def never_answered() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(KIB))
        origin.fault("*", Late(), methods=EVERY_METHOD)
        yield Kept(ref, lambda _: bool(origin.requests))


@contextmanager
def dripped_head() -> Iterator[Kept]:
    with Scripted(dripping) as server:
        yield Kept(f"{server.url}/it", lambda _: server.accepted > 0)


@contextmanager
def handshake() -> Iterator[Kept]:
    with Scripted(silent) as server:
        yield Kept(server.url.replace("http:", "https:") + "/it", lambda _: server.accepted > 0)


@contextmanager
def tunnel() -> Iterator[Kept]:
    with Scripted(silent) as proxy:
        # loopback is asked without a proxy, another address of the allowed network by it
        yield Kept("http://10.1.2.3/it", lambda _: proxy.accepted > 0, {"proxy": proxy.url})


@contextmanager
def connecting() -> Iterator[Kept]:
    with black_hole() as (host, port):
        resolving = shows("it", ("state", "resolving"))
        yield Kept(f"http://{host}:{port}/it", resolving, {"connect_seconds": 600})


@contextmanager
def many_slow_files() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add_model("it", {f"{number}.bin": b"x%d" % number for number in range(2000)})
        origin.fault("*", Late(3.0), methods=("HEAD",))
        yield Kept(ref, lambda _: any(seen.method == "HEAD" for seen in origin.requests))


@contextmanager
def pages_without_end() -> Iterator[Kept]:
    with Bucket() as bucket:
        bucket.fault("/models", EndlessPages())
        yield Kept("s3://models/it/", lambda _: len(bucket.requests) > 3, {"s3_endpoint_url": bucket.url})


@contextmanager
def listing_of_a_bucket() -> Iterator[Kept]:
    with Bucket() as bucket:
        bucket.fault("/models", Late(), methods=EVERY_METHOD)
        yield Kept("s3://models/it/", lambda _: bool(bucket.requests), {"s3_endpoint_url": bucket.url})


@contextmanager
def listing_of_the_hub() -> Iterator[Kept]:
    with Hub() as hub:
        hub.add("org/it", {"config.json": b"{}"})
        hub.fault("*", Late(), methods=EVERY_METHOD)
        yield Kept("hf://org/it", lambda _: bool(hub.requests), {"hf_endpoint": hub.url})


@contextmanager
def back_off_of_a_resolve() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(KIB))
        origin.fault("*", Status(429, LONG_AGO), methods=EVERY_METHOD)
        yield Kept(ref, shows("it", ("state", "waiting"), ("waits", "origin")))


@contextmanager
def back_off_of_a_download() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(6 * MIB))
        origin.fault("*", Status(429, LONG_AGO))
        yield Kept(ref, shows("it", ("state", "downloading"), ("waits", "origin")))


@contextmanager
def dripped_bytes() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(6 * MIB))
        origin.fault("*", Trickle(2400))
        yield Kept(ref, shows("it", ("state", "downloading"), ("waits", "slow")))


KEPT = {
    "a request is never answered": never_answered,
    "the head of an answer drips": dripped_head,
    "a TLS handshake is never answered": handshake,
    "CONNECT is never answered": tunnel,
    "a connection is never taken": connecting,
    "2,000 requests take three seconds each": many_slow_files,
    "a listing has no last page": pages_without_end,
    "a listing of a bucket is never answered": listing_of_a_bucket,
    "a listing of the Hub is never answered": listing_of_the_hub,
    "it is to wait for 30 years": back_off_of_a_resolve,
    "its download is to wait for 30 years": back_off_of_a_download,
    "its bytes drip": dripped_bytes,
}


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Iterator[Kept]:
    with KEPT[request.param]() as found:
        yield found


@pytest.mark.parametrize("end", ["SIGTERM", "DELETE", "replace"])
def test_a_pull_ends_promptly_wherever_its_origin_keeps_it(
    kept: Kept, end: str, node: Callable[..., Node], origin: Origin
) -> None:
    """Promised: A cancel, a delete or a stop ends a pull at once, wherever its source keeps it waiting."""
    running = node(env=S3_KEYS, pulls=1, allow=["127.0.0.0/8", "10.0.0.0/8"], **kept.options)
    assert running.pull(kept.ref, name="it").status == 202
    until(lambda: kept.arrived(running))
    began = time.monotonic()
    if end == "SIGTERM":
        assert running.stop() == 0
        assert time.monotonic() - began < PROMPT_SECONDS
    elif end == "DELETE":
        assert running.ask("DELETE", "/v1/models/it").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS
    else:
        other = origin.add("/other", noise(KIB))
        assert running.pull(other, name="it", replace=True).status == 202
        assert running.ready("it").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS


@pytest.mark.parametrize("end", ["SIGTERM", "DELETE"])
def test_a_pull_that_waits_for_space_ends_promptly(
    end: str, node: Callable[..., Node], origin: Origin
) -> None:
    """The room for its second file is gone when that begins."""
    running = node(streams=1)
    hold = origin.hold("/two/first.bin", after=MIB)
    running.pull(origin.add_model("two", {"first.bin": noise(12 * MIB, 1), "second.bin": noise(10 * MIB, 2)}))
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.configure(**{**running.options, "reserve_free": "99%"})
    until(lambda: running.ask("GET", "/v1/capacity").document["reserve_free_bytes"])
    hold.release()
    until(lambda: shows("two", ("waits", "space"))(running))
    began = time.monotonic()
    if end == "SIGTERM":
        assert running.stop() == 0
        assert time.monotonic() - began < PROMPT_SECONDS
    else:
        assert running.ask("DELETE", "/v1/models/two").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS


# --- other pulls, meanwhile ---


def elsewhere(origin: Origin) -> str:
    """The same origin by another name of its host."""
    return origin.url.replace("127.0.0.1", "localhost")


@pytest.fixture
def started(engine: Engines) -> Iterator[Callable[..., Engine]]:
    """An engine whose pulls are all stopped in the end."""
    with ExitStack() as stack:

        def opened(**options: object) -> Engine:
            running = engine(allow=("127.0.0.0/8", "::1/128", "http://localhost/"), **options)
            stack.callback(running.pulls.interrupt)
            return running

        yield opened


@dataclass(eq=False)
class Asked:
    """What stands in a line."""

    scheme: str
    host: str
    priority: int = 0


def read_status(node: Node, name: str, **wanted: object) -> dict[str, Any] | None:
    """What the status file of a name says, once it says this."""
    told: dict[str, Any] = json.loads((node.root / f"status/{name}.json").read_bytes())
    return told if wanted.items() <= told.items() else None


def begin(running: Engine, ref: str, name: str) -> None:
    assert running.pulls.start(spec_of(ref, name=name)) is not None


def test_four_directories_that_take_three_seconds_a_file_keep_no_other_host_waiting(
    origin: Origin, started: Callable[..., Engine]
) -> None:
    files = {f"{number}.bin": b"x%d" % number for number in range(2000)}
    origin.fault("*", Late(3.0), methods=("HEAD",), when=lambda seen: "/evil" in seen.path)
    running = started(pulls=4)
    for number in range(4):
        begin(running, origin.add_model(f"evil-{number}", files), f"evil-{number}")
    good = origin.add("/good", noise(KIB)).replace(origin.url, elsewhere(origin))
    began = time.monotonic()
    running.pull(good)
    assert time.monotonic() - began < 20.0


def test_a_pull_that_is_told_to_wait_for_30_years_gives_its_only_slot_to_the_next(
    origin: Origin, started: Callable[..., Engine]
) -> None:
    origin.fault("/evil", Status(503, LONG_AGO), methods=EVERY_METHOD)
    running = started(pulls=1)
    begin(running, origin.add("/evil", noise(KIB)), "evil")
    began = time.monotonic()
    running.pull(origin.add("/good", noise(KIB)))
    assert time.monotonic() - began < PROMPT_SECONDS
    waiting = running.pulls.get("evil")
    assert waiting is not None
    assert waiting.progress.state == "waiting"
    waits = waiting.progress.waits(waiting.progress.now)
    assert waits is not None
    assert 0 < (waits.until or 0.0) - time.time() < 700


def test_a_download_that_is_told_to_wait_for_30_years_gives_its_only_slot_to_the_next(
    origin: Origin, started: Callable[..., Engine]
) -> None:
    origin.fault("/evil", Status(503, LONG_AGO))
    running = started(pulls=1)
    begin(running, origin.add("/evil", noise(MIB)), "evil")
    good = origin.add("/good", noise(KIB)).replace(origin.url, elsewhere(origin))
    began = time.monotonic()
    running.pull(good)
    assert time.monotonic() - began < 20.0


def test_a_host_that_drips_on_every_stream_leaves_some_to_another(
    origin: Origin, started: Callable[..., Engine]
) -> None:
    origin.fault("/evil", Trickle(2400))
    running = started(pulls=2, streams=2)
    begin(running, origin.add("/evil", noise(32 * MIB)), "evil")
    until(lambda: origin.bytes_sent("/evil") > 20 * KIB)
    good = origin.add("/good", noise(6 * MIB)).replace(origin.url, elsewhere(origin))
    began = time.monotonic()
    running.pull(good)
    assert time.monotonic() - began < 20.0


def test_what_gave_its_stream_away_goes_on_where_it_was_and_has_not_failed(
    origin: Origin, started: Callable[..., Engine]
) -> None:
    content = noise(6 * MIB)
    ref = origin.add("/slow", content)
    origin.fault("/slow", Trickle(40 * KIB), times=1)
    running = started(pulls=2, streams=1, retries=0)
    slow = running.pulls.start(spec_of(ref))
    assert slow is not None
    until(lambda: origin.bytes_sent("/slow") > 100 * KIB)
    running.pull(origin.add("/good", noise(6 * MIB, 2)).replace(origin.url, elsewhere(origin)))
    slow.done.result(PATIENCE_SECONDS)
    assert slow.progress.fetched == len(content)


def test_pulls_of_one_host_leave_a_slot_to_others_that_wait_and_take_all_when_none_does() -> None:
    line: SlotQueue[Asked] = SlotQueue(3, lambda _: None)
    evil = [Asked("http", "evil") for _ in range(6)]
    good = [Asked("http", "good"), Asked("http", "good")]
    for each in (*evil, *good):
        line.add(each)
    first = {line.next() for _ in range(3)}
    assert len(first & set(evil)) == 2, "though more of them came first"
    assert len(first & set(good)) == 1


def test_a_pull_that_lent_its_slot_gets_one_before_any_that_is_new() -> None:
    line: SlotQueue[Asked] = SlotQueue(1, lambda _: None)
    slow, quick, new = Asked("http", "slow"), Asked("http", "quick"), Asked("http", "new")
    line.add(slow)
    assert line.next() is slow
    line.lend(slow)
    line.add(quick)
    assert line.next() is quick
    line.add(new)
    with ThreadPoolExecutor(2) as pool:
        back = pool.submit(line.take_when_free, slow, CancelToken())
        until(lambda: line.returning == 1)
        next_one = pool.submit(line.next)
        line.end(quick)
        back.result(PATIENCE_SECONDS)
        assert not next_one.done()
        line.end(slow)
        assert next_one.result(PATIENCE_SECONDS) is new


def test_a_host_whose_pulls_all_lend_their_slots_gets_no_more_threads_than_there_are_slots() -> None:
    line: SlotQueue[Asked] = SlotQueue(2, lambda _: None)
    for _ in range(9):
        line.add(Asked("http", "evil"))
    for _ in range(2):
        found = line.next()
        assert found is not None
        line.lend(found)
    good = Asked("http", "good")
    line.add(good)
    assert line.next() is good


def test_a_pull_that_waits_for_a_slot_again_ends_when_it_is_cut() -> None:
    line: SlotQueue[Asked] = SlotQueue(1, lambda _: None)
    slow, token = Asked("http", "slow"), CancelToken()
    line.add(slow)
    line.next()
    line.lend(slow)
    line.add(Asked("http", "quick"))
    line.next()
    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(line.take_when_free, slow, token)
        until(lambda: line.returning == 1)
        token.cancel()
        with pytest.raises(Cancelled):
            back.result(PATIENCE_SECONDS)


# --- how long a source may take ---


def test_a_source_that_does_not_end_is_given_up_and_may_be_asked_again(
    origin: Origin, node: Callable[..., Node]
) -> None:
    ref = origin.add_model("it", {f"{number}.bin": b"x%d" % number for number in range(1000)})
    origin.fault("*", Late(0.5), methods=("HEAD",))
    running = node(resolve_seconds=3)
    running.pull(ref, name="it")
    answer = running.ready("it")
    told = answer.document
    assert (answer.status, told["code"], told["final"]) == (503, "resolve_too_slow", False)
    asked = len(origin.requests)
    running.pull(origin.add("/other", b"x"))
    assert running.ready("other").status == 200
    assert len(origin.requests) - asked < 16, "nothing of it is asked any more"


def answered(patience: Patience, seconds_each: float, *, at_once: int, files: int) -> str:
    """What patience says of a directory of so many files whose answers take so long."""
    for number in range(files // at_once):
        if why := patience.why_not(number * at_once, number * seconds_each):
            return why
    return ""


def test_a_slow_directory_passes_and_one_that_drips_does_not() -> None:
    def patience(seconds: float = 1800.0) -> Patience:
        return Patience(seconds, stall_seconds=30.0, now=0.0)

    assert answered(patience(), 3.0, at_once=8, files=2000) == ""
    assert answered(patience(), 25.0, at_once=8, files=2000) == "24 answers in 75 s"
    assert answered(patience(), 25.0, at_once=8, files=16) == "", "few files take as long as they do"
    assert answered(patience(600.0), 3.0, at_once=8, files=2000).startswith("not done after 600 s")


def test_an_origin_may_take_its_time_for_one_answer_where_the_operator_says_so() -> None:
    patience = Patience(1800.0, stall_seconds=600.0, now=0.0)
    assert patience.why_not(0, 599.0) == ""
    assert patience.why_not(0, 1200.0) == "0 answers in 1200 s"


@pytest.mark.parametrize(
    ("told", "wait", "shown"),
    [
        ("1000000000", 600.0, 1e9),
        ("9" * 40, 600.0, 1e18),
        ("9" * 400, None, None),
        ("-5", None, None),
        ("1e9", None, None),
        ("soon", None, None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600.0, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0, 0.0),
        ("Mon, 99 Foo 99999 99:99:99 GMT", None, None),
        ("5", 5.0, 5.0),
    ],
)
def test_what_an_origin_asks_for_is_capped_and_garbage_asks_for_nothing(
    told: str, wait: float | None, shown: float | None
) -> None:
    headers = {"Retry-After": told}
    assert retry_after(headers) == wait
    assert requested_wait(headers) == shown or "9999" in told


def test_who_asks_learns_why_a_pull_waits_and_until_when(origin: Origin, node: Callable[..., Node]) -> None:
    ref = origin.add("/it", noise(KIB))
    origin.fault("/it", Status(429, LONG_AGO), methods=EVERY_METHOD)
    running = node()
    running.pull(ref)
    until(lambda: shows("it", ("state", "waiting"))(running))
    waits = running.ask("GET", "/v1/models/it").document["pull"]["waits"]
    assert (waits["reason"], "1000000000 s" in waits["detail"]) == ("origin", True)
    seconds = datetime.fromisoformat(waits["until"]).timestamp() - time.time()
    assert 500 < seconds < 700
    told = until(lambda: read_status(running, "it", state="waiting"))
    assert (told["waits"], told["final"]) == (waits, False)
    answer = running.ask("GET", "/v1/models/it/ready")
    assert (answer.status, answer.document["state"]) == (503, "waiting")


# --- one call of a source ---


@pytest.mark.parametrize("script", [dripping, silent], ids=["drips", "is silent"])
@pytest.mark.parametrize("call", ["head", "read", "get", "relay"])
def test_a_cut_ends_a_request_of_any_kind(script: Callable[[socket.socket, int], None], call: str) -> None:
    http = Http(
        AddressPolicy(["127.0.0.0/8"]),
        authorities=Authorities(None),
        timeouts=Timeouts(stall_seconds=PATIENCE_SECONDS),
    )
    with Scripted(script) as server:
        url, token = f"{server.url}/x", CancelToken()
        calls: dict[str, Callable[[], object]] = {
            "head": lambda: http.head(url, token),
            "read": lambda: http.read(url, token, at_most=KIB),
            "get": lambda: http.get(url, token),
            "relay": lambda: http.relay(Request("POST", urlsplit(url), {}, b"x"), token),
        }
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(calls[call])
            until(lambda: server.accepted)
            began = time.monotonic()
            token.cancel()
            with pytest.raises(Cancelled):
                asked.result(PATIENCE_SECONDS)
        assert time.monotonic() - began < PROMPT_SECONDS


def test_a_cut_ends_a_listing_that_drips() -> None:
    http = Http(
        AddressPolicy(["127.0.0.0/8"]),
        authorities=Authorities(None),
        timeouts=Timeouts(stall_seconds=PATIENCE_SECONDS),
    )
    with Origin() as origin:
        url, token = origin.add("/listing", noise(MIB)), CancelToken()
        origin.fault("/listing", Trickle(2400))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(http.read, url, token, at_most=MIB)
            until(lambda: origin.bytes_sent("/listing") > KIB)
            token.cancel()
            with pytest.raises(CachdError):
                asked.result(PROMPT_SECONDS)


def test_a_cut_ends_a_connection_that_is_never_taken() -> None:
    with black_hole() as hole, ThreadPoolExecutor(1) as pool:
        token = CancelToken()
        address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", hole)
        dialled = pool.submit(dial, [address], PATIENCE_SECONDS, token)
        until(lambda: token.is_awaited)
        token.cancel()
        with pytest.raises(Cancelled):
            dialled.result(PROMPT_SECONDS)


class DeafResolver:
    """A resolver that answers nobody until it is let go."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Semaphore(0), threading.Event()

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.release()
        self.go_on.wait(PATIENCE_SECONDS)
        raise OSError("no answer")


def test_a_cut_ends_a_look_up_of_a_name_and_so_does_its_time() -> None:
    deaf = DeafResolver()
    token = CancelToken()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(Names(PATIENCE_SECONDS, deaf).addresses, "slow.test", 80, token)
        assert deaf.asked.acquire(timeout=PATIENCE_SECONDS)
        token.cancel()
        with pytest.raises(Cancelled):
            asked.result(PROMPT_SECONDS)
    with pytest.raises(Unavailable) as refused:
        Names(0.1, deaf).addresses("slow.test", 80, CancelToken())
    assert refused.value.code == "dns_failed"
    deaf.go_on.set()


def test_look_ups_that_were_left_behind_are_bounded() -> None:
    deaf = DeafResolver()
    names = Names(0.01, deaf)
    for _ in range(MAX_LEFT + 5):
        with pytest.raises(Unavailable) as refused:
            names.addresses("slow.test", 80, CancelToken())
    assert f"{MAX_LEFT} earlier calls still wait" in refused.value.detail
    deaf.go_on.set()


def test_a_dry_run_that_waits_for_a_source_does_not_keep_a_stop_waiting(
    origin: Origin, node: Callable[..., Node]
) -> None:
    ref = origin.add("/it", noise(KIB))
    origin.fault("*", Late(), methods=EVERY_METHOD)
    running = node()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, "POST", "/v1/evictions?dry_run=true", {"ref": ref})
        until(lambda: origin.requests)
        began = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - began < PROMPT_SECONDS
        with suppress(OSError, HTTPException):
            assert asked.result(PATIENCE_SECONDS).status >= 400
