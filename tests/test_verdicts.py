"""The entries of `sources` allow and refuse places; the longest prefix decides."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from cachd.errors import Forbidden
from cachd.policy.prefixes import Prefix
from cachd.policy.verdicts import NO_VERDICTS, Rule, Verdicts


def verdicts(*refused: str, allowed: tuple[str, ...] = (), opened: tuple[str, ...] = ()) -> Verdicts:
    prefixes = {Prefix.parse(text): text in refused for text in (*refused, *allowed, *opened)}
    return Verdicts(
        {
            prefix: Rule(not is_refused, prefix, opens=prefix.text in opened)
            for prefix, is_refused in prefixes.items()
        }
    )


MIXED = verdicts(
    "hf://org/bad/", "hf://datasets/", "https://h/a/", allowed=("hf://org/", "hf://", "https://h/")
)


@pytest.mark.parametrize(
    ("base", "by"),
    [
        ("hf://org/bad", "hf://org/bad/"),
        ("hf://org/good", None),
        ("hf://other/model", None),
        ("hf://datasets/other/it", "hf://datasets/"),
        (
            "hf://datasets/org/it",
            "hf://datasets/",
        ),  # of two that are equally long, one that refuses is enough
        ("https://h/a/b", "https://h/a/"),
        ("https://h/b", None),
        ("https://elsewhere/b", None),
    ],
)
def test_the_longest_prefix_decides_and_what_none_covers_is_allowed(base: str, by: str | None) -> None:
    refused = MIXED.refusal(base)
    assert refused == (Prefix.parse(by) if by else None)
    assert NO_VERDICTS.refusal(base) is None


@pytest.mark.parametrize(
    ("base", "is_allowed"),
    [("https://h/b", True), ("hf://org/good", True), ("hf://other/it", False), ("https://x/b", False)],
)
def test_a_rule_for_more_than_a_scheme_allows_a_host(base: str, is_allowed: bool) -> None:
    assert MIXED.allows_host(base) is is_allowed


def test_a_request_is_refused_by_the_longest_prefix_that_is_more_than_a_scheme() -> None:
    rules = verdicts("https://", "https://h/a/", allowed=("https://h/",))
    for url in ("https://h/", "https://h/ab", "https://elsewhere/a/x", "https://h/?a/"):
        rules.check_request(urlsplit(url))
    for url in ("https://h/a/x", "https://h/a/x?signature=hunter2", "https://h:443/a/"):
        with pytest.raises(Forbidden) as refused:
            rules.check_request(urlsplit(url))
        assert refused.value.code == "source_refused"
        assert "hunter2" not in str(refused.value)
    NO_VERDICTS.check_request(urlsplit("https://h/a/x"))


def test_entries_that_open_a_place_are_prefixes_of_addresses_with_more_than_a_scheme() -> None:
    rules = verdicts(
        allowed=("https://c/",), opened=("https://a/b/", "file:///mnt/", "https://", "hf://org/")
    )
    assert sorted(rules.opened) == sorted(
        Prefix.parse(text).text for text in ("https://a/b/", "file:///mnt/")
    )
