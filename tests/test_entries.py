"""The columns of an entry of `sources`: which values they take, and what their lists mean."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cachd.model import SCHEMES
from cachd.policy.prefixes import Prefix
from cachd.sources.entries import COLUMNS, Entry, columns, doubled, is_beneath, is_pattern, schemes_of

HEX = "a" * 64


def entry(prefix: object = "hf://org/", **values: Any) -> Entry:
    return Entry.model_validate({"prefix": prefix, **values})


def fault(prefix: object = "hf://org/", **values: Any) -> str:
    """What is wrong with an entry; empty if nothing is."""
    try:
        entry(prefix, **values)
    except ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *((word, True) for word in (True, "true", " YES ", "on", "1")),
        *((word, False) for word in (False, "false", "No", "off", "0")),
        (None, None),
        ("", ()),
        ("*.bin", ("*.bin",)),
        (" *.bin, ,*.pt ", ("*.bin", "*.pt")),
        (["*.bin", " ", " *.pt"], ("*.bin", "*.pt")),
        (("true",), ("true",)),
        ([], ()),
    ],
)
def test_allow_and_refuse_are_a_flag_or_a_list(written: object, read: object) -> None:
    for column in ("allow", "refuse"):
        values: dict[str, Any] = {column: written}
        found = getattr(entry(**values), column)
        assert (type(found), found) == (type(read), read)


@pytest.mark.parametrize("written", [7, 1.5, [1], ["a", None], {"a": "b"}])
def test_what_is_neither_a_flag_nor_a_list_of_texts_is_refused(written: object) -> None:
    assert "is neither true nor false, nor a list" in fault(allow=written)


def test_a_list_has_a_thousand_items_of_512_characters_at_most() -> None:
    assert fault(refuse=["*"] * 1000) == ""
    assert "more than 1000 items" in fault(refuse=["*"] * 1001)
    assert fault(refuse=["x" * 512]) == ""
    assert "more than 512 characters" in fault(refuse=["*", "x" * 513])


@pytest.mark.parametrize("column", ["instance_role", "anonymous", "requester_pays"])
def test_a_flag_is_a_word_for_yes_or_no(column: str) -> None:
    for word in (True, " Yes", "ON", "1", "true"):
        assert getattr(entry("s3://bkt/", **{column: word}), column) is True
    for word in (False, "no ", "OFF", "0", "false"):
        assert getattr(entry("s3://bkt/", **{column: word}), column) is False
    assert getattr(entry("s3://bkt/"), column) is None
    for wrong in ("perhaps", "", ["yes"], 2):
        assert fault("s3://bkt/", **{column: wrong})


def test_a_prefix_is_a_text_or_one_that_was_read() -> None:
    assert entry(Prefix.parse("s3://bkt/")).prefix == entry("s3://bkt").prefix == Prefix.parse("s3://bkt/")
    assert "is not a prefix" in fault("b")
    assert "is not a prefix" in fault(7)


def test_a_column_is_for_its_schemes_alone() -> None:
    assert schemes_of("region") == ("s3",)
    assert schemes_of("headers_file") == ("https", "http")
    assert schemes_of("limit") == tuple(SCHEMES)
    assert "is for s3:// alone" in fault(region="r")
    assert fault(region=None) == ""
    assert "is for https:// and http:// alone" in fault(headers_file="/x")
    shown = {name: (schemes, text) for name, schemes, text in columns()}
    assert tuple(shown) == COLUMNS
    assert "prefix" not in shown
    assert (shown["region"][0], shown["headers_file"][0], shown["limit"][0]) == ("s3", "https, http", "all")
    assert all(text for _, text in shown.values())


def test_the_set_columns_are_those_with_a_value_also_if_it_is_false() -> None:
    found = entry(allow=False, refuse=["*.bin"], limit=0)
    assert dict(found.set_columns()) == {"allow": False, "refuse": ("*.bin",), "limit": 0}
    assert (found.items("refuse"), found.items("allow"), found.items("limit")) == (("*.bin",), (), ())


@pytest.mark.parametrize(
    ("prefix", "item", "beneath", "pattern"),
    [
        ("hf://", "org/", True, False),
        ("hf://", "org", False, True),
        ("hf://", "a/b/", False, True),
        ("hf://", "o*/", False, True),
        ("hf://", "o?/", False, True),
        ("hf://", "[o]/", False, True),
        ("hf://org/", "org/", False, True),
        ("hf://", f"sha256:{HEX}", False, False),
    ],
)
def test_an_item_is_a_place_a_pattern_or_a_digest(
    prefix: str, item: str, beneath: bool, pattern: bool
) -> None:
    of = Prefix.parse(prefix)
    assert (is_beneath(item, of), is_pattern(item, of)) == (beneath, pattern)


@pytest.mark.parametrize(
    ("prefix", "column", "item", "wrong"),
    [
        ("hf://", "allow", "good/", ""),
        ("hf://", "allow", "*good", ""),
        ("hf://", "allow", "good", "may be a name or a file: write good/ or '*good'"),
        ("hf://org/", "allow", "good", ""),
        ("hf://", "allow", "bad name/", "is not a prefix"),
        ("hf://", "refuse", f"sha256:{HEX}", ""),
        ("hf://", "allow", f"sha256:{HEX}", "a digest can be refused"),
        ("hf://", "refuse", "sha256:12", "is not a sha256 digest"),
    ],
)
def test_an_item_that_is_malformed_or_ambiguous_is_refused(
    prefix: str, column: str, item: str, wrong: str
) -> None:
    found = fault(prefix, **{column: [item]})
    assert wrong in found
    assert bool(found) == bool(wrong)


@pytest.mark.parametrize("other", [{"credentials": "/x"}, {"profile": "p"}, {"instance_role": True}])
def test_anonymous_goes_with_no_credentials(other: dict[str, Any]) -> None:
    assert "anonymous sends no credentials" in fault("s3://bkt/", anonymous=True, **other)
    assert fault("s3://bkt/", anonymous=False, **other) == ""
    assert fault("s3://bkt/", anonymous=True, instance_role=False) == ""


def test_allow_and_refuse_may_not_say_opposite_things() -> None:
    for flag in (True, False):
        assert "say opposite things" in fault(allow=flag, refuse=flag)
        assert fault(allow=flag, refuse=not flag) == ""
        assert fault(allow=flag) == ""
    assert fault(allow=["*.bin"], refuse=["*.bin"]) == ""


def test_each_entry_that_repeats_a_prefix_is_found_with_the_first() -> None:
    entries = [entry(text) for text in ("hf://a/", "hf://b/", "HF://a", "hf://c/", "hf://b", "hf://a/")]
    assert list(doubled(entries)) == [(0, 2), (1, 4), (0, 5)]
