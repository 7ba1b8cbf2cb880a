"""Which prefixes of `sources` cover a ref: by whole steps, in one form, the longest first."""

from __future__ import annotations

import string
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Forbidden, Invalid
from cachd.policy.prefixes import Prefix, Prefixes, steps_of

# --- against a naive matcher ---

PORTS = {"http": 80, "https": 443}
names = st.sampled_from(["a", "b", "ab", "a b", "é", "a.b", "A", "host", "models"])
hosts = st.sampled_from(["host", "host.evil", "hostevil", "a.host", "127.0.0.1", "[::1]"])


@dataclass(frozen=True)
class Place:
    """What is meant by a URL: where it leads, with nothing of how it is written."""

    scheme: str
    host: str
    port: int
    path: tuple[str, ...]


places = st.builds(
    Place,
    st.sampled_from(["http", "https"]),
    hosts,
    st.sampled_from([80, 443, 8443]),
    st.lists(names, max_size=3).map(tuple),
)


@st.composite
def written(draw: st.DrawFn, place: Place) -> str:
    """One of the ways to write a place."""

    def cased(text: str) -> str:
        return "".join(c.upper() if draw(st.booleans()) else c for c in text)

    def encoded(name: str) -> str:
        plain = string.ascii_letters + string.digits
        return "".join(
            c
            if c in plain and draw(st.booleans())
            else quote(c, safe="")
            if not c.isalnum() or not c.isascii()
            else f"%{ord(c):02X}"
            for c in name
        )

    is_default = place.port == PORTS[place.scheme]
    port = "" if is_default and draw(st.booleans()) else f":{place.port}"
    path = "".join(f"/{encoded(name)}" for name in place.path)
    return f"{place.scheme}://{cased(place.host)}{port}{path}{'/' if draw(st.booleans()) else ''}"


def naive(prefix: Place, place: Place) -> bool:
    same = (prefix.scheme, prefix.host, prefix.port) == (place.scheme, place.host, place.port)
    return same and place.path[: len(prefix.path)] == prefix.path


@given(st.data(), st.lists(places, max_size=8, unique=True), places)
def test_the_prefixes_that_cover_a_url_are_those_a_naive_matcher_finds_the_longest_first(
    data: st.DataObject, meant: list[Place], place: Place
) -> None:
    table = Prefixes({Prefix.parse(data.draw(written(each))): each for each in meant})
    found = [each for _, each in table.covering(data.draw(written(place)))]
    covering = [each for each in meant if naive(each, place)]
    assert found == sorted(covering, key=lambda each: -len(each.path))


steps = st.lists(st.sampled_from(["abc", "abd", "abcd", "x", "y.z", "A-1"]), min_size=1, max_size=4).map(
    tuple
)


@given(st.sampled_from(["hf", "s3", "file"]), st.lists(steps, max_size=8), steps)
def test_the_prefixes_that_cover_a_name_are_those_a_naive_matcher_finds_the_longest_first(
    scheme: str, prefixes: list[tuple[str, ...]], name: tuple[str, ...]
) -> None:
    def form(parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(p.lower() for p in parts) if scheme == "hf" else parts

    most = 2 if scheme == "hf" else 4
    usable = [
        p for p in prefixes if len(p) <= most and not (scheme == "s3" and (len(p[0]) < 3 or p[0] == "A-1"))
    ]
    start = "file:///" if scheme == "file" else f"{scheme}://"
    table = Prefixes({Prefix.parse(start + "/".join(p)): form(p) for p in usable})
    found = [each for _, each in table.covering(start + "/".join(name))]
    wanted = {form(p) for p in usable if form(name)[: len(p)] == form(p)}
    assert found == sorted(wanted, key=lambda each: -len(each))


kinds, owners = st.sampled_from(["", "datasets/", "kernels/"]), st.sampled_from(["", "a/", "b/"])


@given(st.sets(st.builds(str.__add__, kinds, owners)), kinds, owners.filter(bool))
def test_the_prefix_of_an_organisation_covers_its_repositories_of_every_kind(
    prefixes: set[str], kind: str, owner: str
) -> None:
    table = Prefixes({Prefix.parse(f"hf://{each}"): each for each in prefixes})
    found = [each for _, each in table.covering(f"hf://{kind}{owner}name@0123/file".replace("a", "A"))]
    by_length = dict.fromkeys([kind + owner, owner, kind, ""])
    assert found == [each for each in by_length if each in prefixes]


@given(st.text(max_size=40), st.sampled_from(["hf://", "s3://", "https://", "http://", "file:///", ""]))
def test_any_text_is_a_prefix_or_is_refused_with_a_reason(text: str, scheme: str) -> None:
    with suppress(Invalid):
        prefix = Prefix.parse(scheme + text)
        assert Prefix.parse(prefix.text) == prefix  # one form, whatever was typed
        if prefix.steps:
            assert steps_of(prefix.text) == (prefix.scheme, prefix.steps)
            assert covers(prefix.text, prefix.text)


# --- by example ---


def covers(prefix: str, url: str) -> bool:
    return bool(Prefixes({Prefix.parse(prefix): True}).covering(url))


@pytest.mark.parametrize(
    ("prefix", "url"),
    [
        ("hf://", "hf://org/model"),
        ("hf://org", "hf://org/model"),
        ("hf://org/", "hf://ORG/model"),  # the Hub knows names in any case
        ("hf://org/", "hf://datasets/ORG/data"),
        ("hf://datasets/", "hf://datasets/org/data@0123/file"),
        ("ms://org/", "ms://org/model"),
        ("HF://Org/Model", "hf://org/model@0123/file.bin"),
        ("s3://bucket", "s3://bucket/x/"),
        ("s3://bucket/x/", "s3://bucket/x"),
        ("https://host", "https://HOST:443/file"),
        ("https://host:443/", "https://host/file"),
        ("https://host", "https://host./file"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/x"),
        ("https://BÜCHER.example/", "https://bücher.example/x"),
        ("http://127.0.0.1/", "http://127.1/x"),
        ("http://127.0.0.1/", "http://0x7f.0.0.1/x"),
        ("http://[::1]/", "http://[0:0:0:0:0:0:0:1]/x"),
        ("https://host/a b/", "https://host/a%20b/x"),
        ("file:///shares/a/", "file:///shares/a/model/"),
        ("file:///shares/a/", "file:///shares%2Fa/model/"),  # it is opened at the decoded path
    ],
)
def test_a_prefix_covers_what_leads_there_however_it_is_written(prefix: str, url: str) -> None:
    if "a b" in prefix:
        prefix = prefix.replace(" ", "%20")
    assert covers(prefix, url)


@pytest.mark.parametrize(
    ("prefix", "url"),
    [
        ("hf://org", "hf://orgother/model"),
        ("hf://org/model", "hf://org/model2"),
        ("hf://org/model", "hf://datasets/org/model"),
        ("hf://datasets/org/", "hf://org/model"),
        ("hf://datasets/org/", "hf://kernels/org/kernel"),
        ("hf://datasets/", "hf://org/datasets"),
        ("s3://models/", "s3://datasets/models/x"),
        ("s3://bucket/x", "s3://bucket/xy/"),
        ("s3://bucket", "s3://bucket2/x/"),
        ("s3://bucket/x/", "s3://bucket/X/"),
        ("https://host", "https://host.evil/x"),
        ("https://host", "https://hostevil/x"),
        ("https://host", "https://host:8443/x"),
        ("https://host", "http://host/x"),
        ("https://host:8443/path", "https://host:8443/pathother"),
        ("file:///shares/a", "file:///shares/ab/x"),
    ],
)
def test_a_prefix_covers_nothing_that_only_begins_like_it(prefix: str, url: str) -> None:
    assert not covers(prefix, url)


@pytest.mark.parametrize(
    "path",
    [
        "/a/../b/x",
        "/a/%2e%2e/b/x",
        "/a%2Fb/x",
        "/a%5Cb/x",
        "/b;p/x",
        "/b//x",
        "//b/x",
        "/%252e%252e/b",
        "/b/./x",
    ],
)
def test_a_path_that_servers_read_in_two_ways_is_refused_where_an_entry_names_a_part_of_the_host(
    path: str,
) -> None:
    with pytest.raises(Forbidden) as refusal:
        covers("https://host/b/", f"https://host{path}")
    assert refusal.value.code == "ambiguous_path"
    assert covers("https://host/", f"https://host{path}")


@pytest.mark.parametrize(
    "typed",
    [
        "org/model",
        "gs://bucket/",
        "hf://org/model/file",
        "hf://org/model@main",
        "hf://or*/",
        "s3://Bucket/",
        "s3://bucket/../x/",
        "s3://bucket//x/",
        "https://user:hunter2@host/",
        "https://host/?token=hunter2",
        "https://host/#hunter2",
        "https://host:99999/",
        "https://host/a/../b/",
        "https://host/a%2Fb/",
        "https://ho st/",
        "https://*.example/",
        "https://straße.example/",  # one standard calls it strasse.example
        "file://host/share",
        "file:///a/%2e%2e/b",
    ],
)
def test_what_is_no_plain_prefix_is_refused_and_no_password_is_repeated(typed: str) -> None:
    with pytest.raises(Invalid) as refusal:
        Prefix.parse(typed)
    assert refusal.value.code == "bad_option"
    assert "hunter2" not in str(refusal.value)


def test_a_prefix_is_below_what_it_covers_a_part_of_and_not_below_itself() -> None:
    prefixes = Prefixes({Prefix.parse("https://host/a/b"): 1})
    below = {url: prefixes.are_below(url) for url in ("https://host", "https://host/a", "https://host/a/b")}
    assert list(below.values()) == [True, True, False]
    assert not prefixes.are_below("https://host/a/b/c")
    assert not prefixes.are_below("https://other/a")


def test_a_prefix_is_shown_in_its_normal_form() -> None:
    assert str(Prefix.parse("HF://org/")) == "hf://org/"
    assert str(Prefix.parse("hf://")) == "hf://"
    assert Prefix.parse("hf://org/") != Prefix.parse("hf://other/")
