"""The pure decisions: which bytes are asked for, how long to wait, and what a source may reach."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cachd.errors import Forbidden, Invalid
from cachd.model import Extent
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.addresses import Address, destination, is_public
from cachd.policy.backoff import FIRST_SECONDS, LONGEST_REQUESTED_SECONDS, LONGEST_SECONDS, delay
from cachd.policy.concurrency import Concurrency
from cachd.policy.parts import MAX_PART_BYTES, MIN_PART_BYTES, Received, part_bytes, split, unkept_bytes
from tests.ground.chance import examples

MIB = 1 << 20


# --- what has landed ---

SIZE = 12
extents = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda p: Extent(min(p), max(p)))


def bytes_of(several: Iterable[Extent]) -> set[int]:
    return {byte for extent in several for byte in range(extent.start, extent.stop)}


def landed_of(several: Iterable[Extent]) -> Received:
    received = Received()
    for extent in several:
        received.add(extent)
    return received


@examples(125)
@given(st.lists(extents, max_size=12))
def test_what_has_landed_is_a_set_of_bytes(added: list[Extent]) -> None:
    received, model = Received(), set()
    for extent in added:
        received.add(extent)
        model |= bytes_of([extent])
        assert received.bytes == len(model)
        assert received.prefix == next(byte for byte in range(SIZE + 1) if byte not in model)
        assert bytes_of(received.gaps(SIZE)) == set(range(SIZE)) - model


@examples(125)
@given(st.lists(extents, max_size=12), st.integers(0, SIZE))
def test_gaps_are_in_order_apart_and_never_empty(added: list[Extent], size: int) -> None:
    inside = [extent for extent in added if extent.stop <= size]
    gaps = list(landed_of(inside).gaps(size))
    assert all(gap.size for gap in gaps)
    assert all(one.stop < other.start for one, other in pairwise(gaps))
    assert sum(gap.size for gap in gaps) + landed_of(inside).bytes == size


@given(st.permutations([Extent(0, 4), Extent(4, 9), Extent(9, 10), Extent(2, 6), Extent(10, 16)]))
def test_the_order_of_landing_changes_nothing(added: list[Extent]) -> None:
    received = landed_of(added)
    assert (received.bytes, received.prefix, list(received.gaps(16))) == (16, 16, [])


def test_an_empty_file_has_no_gaps() -> None:
    assert list(Received().gaps(0)) == []
    assert Received().prefix == 0


# --- parts ---


@examples(125)
@given(extents, st.integers(1, SIZE))
def test_parts_cover_a_gap_exactly_and_begin_at_multiples(gap: Extent, length: int) -> None:
    parts = list(split(gap, length))
    assert [byte for part in parts for byte in range(part.start, part.stop)] == list(
        range(gap.start, gap.stop)
    )
    assert all(0 < part.size <= length for part in parts)
    assert all(part.start % length == 0 for part in parts[1:])
    assert all(part.start // length == (part.stop - 1) // length for part in parts)


@examples(125)
@given(st.integers(0, 1 << 45), st.integers(1, 256))
def test_a_part_has_whole_mebibytes_within_the_limits(size: int, streams: int) -> None:
    length = part_bytes(size, streams)
    assert MIN_PART_BYTES <= length <= MAX_PART_BYTES
    assert length % MIB == 0
    if MIN_PART_BYTES < length < MAX_PART_BYTES:
        assert -(-size // length) <= 4 * streams < -(-size // (length - MIB))


@pytest.mark.parametrize("streams", [1, 4, 23, 24, 25, 64, 170, 256])
def test_what_all_streams_have_not_recorded_is_64_mib_at_most(streams: int) -> None:
    """Promised: kill -9 costs at most 2 MiB a connection, and 64 MiB in all.

    Also just after a step upwards, while the earlier streams still have what they were allowed before.
    """
    concurrency = Concurrency(streams, most=1000)
    more = concurrency.measured(1e6) - streams
    assert more > 0
    assert unkept_bytes(streams) <= 2 << 20
    assert streams * unkept_bytes(streams) + more * unkept_bytes(streams + more) <= 64 << 20


def test_a_file_resumed_with_as_many_streams_has_the_same_parts() -> None:
    size = 100 * MIB
    whole = list(split(Extent(0, size), part_bytes(size, 8)))
    resumed = list(split(Extent(whole[5].start, size), part_bytes(size, 8)))
    assert resumed == whole[5:]


# --- waiting ---

chances = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 10_000), chances)
def test_a_wait_is_at_least_half_its_ceiling_and_never_longer_than_it(failures: int, chance: float) -> None:
    ceiling = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** (min(failures, 100) - 1))
    assert ceiling / 2 <= delay(failures, requested=None, chance=chance) <= ceiling


@given(st.integers(1, 10_000), chances, st.floats(0, allow_nan=False, allow_infinity=True))
def test_what_the_origin_asks_for_is_a_floor_of_ten_minutes_at_most(
    failures: int, chance: float, told: float
) -> None:
    floor = min(told, LONGEST_REQUESTED_SECONDS)
    assert floor <= delay(failures, requested=told, chance=chance) <= floor + LONGEST_SECONDS
    assert LONGEST_REQUESTED_SECONDS == 600


@given(chances)
def test_waits_grow_until_they_reach_a_minute(chance: float) -> None:
    waits = [delay(failures, requested=None, chance=chance) for failures in range(1, 20)]
    assert waits == sorted(waits)
    assert waits[-1] == waits[-2] <= LONGEST_SECONDS == 60


# --- addresses ---


def refusal(reach: AddressPolicy, url: str, address: str | None = None) -> str:
    """The code a URL, or the address it resolved to, is refused with; empty when it is not."""
    parts = urlsplit(url)
    try:
        if address is None:
            reach.check_url(parts)
        else:
            reach.check_address(parts, address)
    except Forbidden as error:
        return error.code
    return ""


PUBLIC = [
    "192.0.1.1",
    "198.17.255.255",
    "198.20.0.1",
    "2001:200::1",
    "2001:4860:4860::8888",
    "3fff:1000::1",
    "2a00:1450::1",
    "8.8.8.8",
    "1.1.1.1",
    "2606:4700:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]
SPECIAL = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12:3456::1"],
    "link-local": ["169.254.169.254", "fe80::1", "fe80::1%eth0"],
    "site-local": ["fec0::1"],
    "shared": ["100.64.0.1"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.2.1", "198.51.100.1", "2001:db8::1"],
    "protocol assignments": [
        "192.0.0.1",
        "192.0.0.192",
        "192.0.0.255",
        "192.88.99.1",
        "2001:2::1",
        "2001:20::1",
    ],
    "benchmarks": ["198.18.0.1", "198.19.255.255"],
    "documentation": ["203.0.113.9", "3fff::1", "3fff:fff:ffff::1"],
    "segment routing": ["5f00::1", "5f00:ffff::1"],
    "discard": ["100::1", "100:0:0:1::1"],
    "unassigned": ["4000::1", "1000::1", "200::1", "e000::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"],
    "compatible": ["::127.0.0.1", "::10.0.0.1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.0.0.1", "64:ff9b:1::a00:1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_reached_by_https_alone(address: str) -> None:
    assert refusal(AddressPolicy([]), "https://host/x", address) == ""
    assert refusal(AddressPolicy([]), "http://host/x", address) == "plaintext_refused"


@pytest.mark.parametrize("address", [a for several in SPECIAL.values() for a in several])
def test_an_address_that_is_not_public_is_refused_whatever_its_form(address: str) -> None:
    for scheme in ("https", "http"):
        assert refusal(AddressPolicy([]), f"{scheme}://host/x", address) == "private_address"


@given(st.ip_addresses())
def test_no_address_is_public_that_the_standard_library_knows_to_be_none(address: Address) -> None:
    known = address.is_private or address.is_multicast or address.is_reserved or address.is_link_local
    assume(known and destination(address) == address)
    assert not is_public(address)


@given(st.integers(0, 2**32 - 1))
def test_no_form_of_an_address_gets_further_than_the_address(number: int) -> None:
    plain = ".".join(str(byte) for byte in number.to_bytes(4, "big"))
    high, low = divmod(number, 1 << 16)
    forms = [f"::ffff:{high:x}:{low:x}", f"64:ff9b::{high:x}:{low:x}", f"2002:{high:x}:{low:x}::1"]
    told = {refusal(AddressPolicy([]), "https://host/x", address) for address in (plain, *forms)}
    assert len(told) == 1


def test_the_refusal_of_an_address_says_how_to_allow_it() -> None:
    with pytest.raises(Forbidden) as refused:
        AddressPolicy([]).check_address(urlsplit("https://minio:9000/b"), "::ffff:10.1.2.3")
    assert refused.value.withheld["address"] == "10.1.2.3"
    assert "https://minio:9000/" in refused.value.hint


# --- networks ---


def test_a_network_opens_exactly_its_addresses_for_both_schemes() -> None:
    reach = AddressPolicy(["10.1.0.0/16", "fd00::/8", "192.168.7.7"])
    for scheme in ("http", "https"):
        for inside in (
            "10.1.0.1",
            "10.1.255.255",
            "::ffff:10.1.2.3",
            "64:ff9b::a01:203",
            "fdff::1",
            "192.168.7.7",
        ):
            assert refusal(reach, f"{scheme}://host/x", inside) == ""
        for outside in ("10.0.255.255", "10.2.0.0", "::ffff:10.2.0.0", "fc00::1", "192.168.7.8", "127.0.0.1"):
            assert refusal(reach, f"{scheme}://host/x", outside) == "private_address"


def test_a_network_opens_plain_http_nowhere_else() -> None:
    reach = AddressPolicy(["10.0.0.0/8"])
    assert refusal(reach, "http://host/x") == "", "its address decides"
    assert refusal(reach, "http://host/x", "8.8.8.8") == "plaintext_refused"


@pytest.mark.parametrize("url", ["file:///etc/shadow", "gopher://host/", "ftp://host/x", "unix:///run/x"])
def test_a_network_opens_no_other_scheme(url: str) -> None:
    assert refusal(AddressPolicy(["0.0.0.0/0", "::/0"]), url) == "path_refused"


# --- prefixes ---


@pytest.mark.parametrize(
    "url", ["http://host/x", "http://169.254.169.254/", "http://[::1]/", "http://0x7f.1/"]
)
def test_plain_http_is_refused(url: str) -> None:
    assert refusal(AddressPolicy([]), url) == "plaintext_refused"


PREFIXES = {
    "http://minio:9000/models/": (
        [
            "http://minio:9000/models/",
            "http://minio:9000/models",
            "http://minio:9000/models/a/b",
            "http://MINIO:9000/models/a",
            "http://minio:9000/models/%61",
            "http://minio:9000/models/..a",
            "http://minio:9000/models/%252e%252e/x",
            "http://minio:9000/models/refs%2Fpr%2F1/x",
        ],
        [
            "http://minio:9000/models-secret/a",
            "http://minio:9000/modelsx",
            "http://minio:9000/",
            "http://minio:9000/models/../admin",
            "http://minio:9000/models/%2e%2e/admin",
            "http://minio:9000/models/%2E./admin",
            "http://minio:9000/models%2f..%2fadmin",
            "http://minio:9000/models%2fx",
            "http://minio:9000/secret/..%2fmodels/x",
            "http://minio:9000/admin;a/%2e%2e/models/x",
            "http://minio:9000/models/..;a/admin",
            "http://minio:9000/models/%2e%2e%3ba/admin",
            "http://minio:9000/models/..%5cadmin",
            "http://minio:9000/models/..\\admin",
            "http://minio:9000/models/a/../b",
            "http://minio:9000/models/./b",
            "http://minio:9000/x/../../admin",
            "http://minio:9000/Models/a",
            "http://minio:9000//models/a",
            "http://minio/models/a",
            "http://minio:9001/models/a",
            "http://minio.evil:9000/models/a",
            "http://evil/minio:9000/models/a",
            "http://min:9000/models/a",
        ],
    ),
    "http://host/models": (
        ["http://host/models/a", "http://host:80/models/a", "http://host/models"],
        ["http://host/models2/a", "http://host:8080/models/a"],
    ),
    "http://host": (
        ["http://host/", "http://host/any/thing", "http://host"],
        ["http://hosts/", "http://host.evil/"],
    ),
    "http://[::1]:80/": (["http://[::1]/x"], ["http://[::2]/x", "http://[::1]:81/x"]),
    "file:///mnt/share/": (
        ["file:///mnt/share/llama", "file:///mnt/share"],
        [
            "file:///mnt/share2/x",
            "file:///mnt/share/../../etc/shadow",
            "file:///mnt/share/%2e%2e/x",
            "file:///mnt",
            "file:///",
            "file:///etc/mnt/share/x",
            "file://host/mnt/share/x",
        ],
    ),
    "file:///": (["file:///etc/shadow", "file:///"], ["http://host/etc/shadow"]),
}


@pytest.mark.parametrize(
    ("prefix", "url"), [(prefix, url) for prefix, (inside, _) in PREFIXES.items() for url in inside]
)
def test_a_prefix_opens_what_is_below_it(prefix: str, url: str) -> None:
    reach = AddressPolicy([prefix])
    assert refusal(reach, url) == ""
    assert refusal(reach, url, "127.0.0.1") == "", "wherever its host is"


@pytest.mark.parametrize(
    ("prefix", "url"), [(prefix, url) for prefix, (_, outside) in PREFIXES.items() for url in outside]
)
def test_a_prefix_opens_nothing_else(prefix: str, url: str) -> None:
    reach = AddressPolicy([prefix])
    assert refusal(reach, url) in ("plaintext_refused", "path_refused", "ambiguous_path")
    assert refusal(reach, url, "127.0.0.1") in ("private_address", "ambiguous_path")


def test_a_prefix_of_https_opens_a_private_host_for_its_paths_alone() -> None:
    reach = AddressPolicy(["https://nas.internal/models/"])
    assert refusal(reach, "https://nas.internal/models/x", "10.0.0.9") == ""
    assert refusal(reach, "https://nas.internal:443/models/x", "10.0.0.9") == ""
    for other in (
        "https://nas.internal/admin",
        "https://nas.internal:8443/models/x",
        "https://other/models/x",
    ):
        assert refusal(reach, other, "10.0.0.9") == "private_address"
    assert refusal(reach, "http://nas.internal/models/x") == "plaintext_refused"


steps = st.lists(
    st.sampled_from(["..", ".", "a", "%2e%2e", ".%2E", "models", "", "%2f", "%252e"]), max_size=8
)


@examples(125)
@given(steps)
def test_no_climbing_path_leaves_a_prefix(parts: list[str]) -> None:
    url = "http://host/models/" + "/".join(parts)
    decoded = "/models/" + "/".join(parts).replace("%2e", ".").replace("%2E", ".").replace("%2f", "/")
    reached: list[str] = []
    for part in decoded.split("/"):
        if part == ".." and reached:
            reached.pop()
        elif part not in ("", ".", ".."):
            reached.append(part)
    if refusal(AddressPolicy(["http://host/models/"]), url) == "":
        assert reached[:1] == ["models"]


def test_more_entries_open_more_and_close_nothing() -> None:
    reach = AddressPolicy(["10.0.0.0/8"])
    more = reach.also(["http://hub.local/"])
    assert refusal(more, "https://h/", "10.0.0.1") == ""
    assert refusal(more, "http://hub.local/x", "192.168.0.1") == ""
    assert refusal(reach, "http://hub.local/x", "192.168.0.1") == "private_address", (
        "and change the first not"
    )


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "host",
        "10.0.0.0/33",
        "10.0.0",
        "http://",
        "http:///path",
        "http://user:pw@host/",
        "http://host/?x=hunter2",
        "http://host/#x",
        "http://host:99999/",
        "http://[::1/",
    ],
)
def test_an_entry_that_is_neither_network_nor_prefix_is_refused(entry: str) -> None:
    with pytest.raises(Invalid) as refused:
        AddressPolicy([entry])
    assert refused.value.code == "bad_option"
    assert "hunter2" not in str(refused.value)
    assert "pw" not in str(refused.value)


# --- how many streams ---


def climbed(bears: Callable[[int], float], *, first: int, most: int, noises: Iterator[float]) -> list[int]:
    """The counts of 120 measurements of an origin that sends `bears(count)` to so many streams."""
    concurrency, counts = Concurrency(first, most), []
    for _ in range(120):
        counts.append(concurrency.count)
        concurrency.measured(bears(concurrency.count) * (1 + next(noises)))
    return counts


LINKS: dict[str, Callable[[int], float]] = {
    "each stream has its own 40": lambda streams: 40.0 * streams,
    "40 a stream on a link of 400": lambda streams: min(40.0 * streams, 400.0),
    "the link suffers beyond 8": lambda streams: min(40.0 * streams, 400.0) * 0.95 ** max(0, streams - 8),
    "bound by cores": lambda streams: 3000.0 - 50.0 * streams,
}


@pytest.mark.parametrize("link", LINKS)
@given(first=st.integers(1, 32), seed=st.integers(0, 1 << 32))
def test_streams_become_as_many_as_a_link_bears(link: str, first: int, seed: int) -> None:
    bears = LINKS[link]
    most = 32
    chance = random.Random(seed)
    noises = (chance.uniform(-0.01, 0.01) for _ in itertools.count())
    counts = climbed(bears, first=first, most=most, noises=noises)
    assert all(1 <= count <= most for count in counts)
    best = max(bears(count) for count in range(1, most + 1))
    assert sum(map(bears, counts[60:])) >= 0.85 * best * 60


def test_on_a_full_link_it_is_tried_with_one_stream_less_not_with_many() -> None:
    counts = climbed(lambda n: min(40.0 * n, 400.0), first=4, most=32, noises=itertools.repeat(0.0))
    filled = next(place for place, count in enumerate(counts) if count >= 10)
    assert min(counts[filled:]) == 9
    assert counts[-1] == 10


def test_streams_that_bring_a_little_each_are_not_given_back_one_by_one() -> None:
    counts = climbed(lambda n: 600.0 * n / (n + 4), first=21, most=32, noises=itertools.repeat(0.0))
    assert min(counts) >= 15


def test_streams_that_bring_nothing_are_given_back_but_for_four() -> None:
    counts = climbed(lambda _: 100.0, first=16, most=32, noises=itertools.repeat(0.0))
    assert counts[-1] == min(counts) == 4
    assert set(climbed(lambda _: 100.0, first=2, most=3, noises=itertools.repeat(0.0))) == {2, 3}


def test_streams_are_given_back_while_the_cores_are_busy_whatever_they_seem_to_bring() -> None:
    concurrency = Concurrency(first=16, most=32)
    counts = [concurrency.measured(100.0 * turn, busy=0.6) for turn in range(30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 4
    assert max(concurrency.measured(100.0 * concurrency.count, busy=0.3) for _ in range(30)) == 32


def test_one_stream_at_most_is_one_stream() -> None:
    assert set(climbed(lambda n: 40.0 * n, first=4, most=1, noises=itertools.repeat(0.0))) == {1}
