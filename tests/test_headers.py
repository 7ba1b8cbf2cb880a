"""The files of extra headers and of a secret query: what they give, and why one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.errors import Invalid
from cachd.sources import headers, query
from cachd.sources.headers import MAX_HEADERS, HeadersFile
from cachd.sources.query import QueryFile

SECRET = "hunter2"


def written(place: Path, text: str | bytes) -> Path:
    file = place / "secret"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("\n \n# a comment: x\n", {}),
        ("Authorization: Bearer x\n", {"Authorization": "Bearer x"}),
        ("A:b", {"A": "b"}),
        ("A:\t b \r\n\nB: c: d", {"A": "b", "B": "c: d"}),
        ("A: b\nA: c", {"A": "c"}),
        (
            "Hosts: a\nIf: b\nContents: c\nRanges: d",
            {"Hosts": "a", "If": "b", "Contents": "c", "Ranges": "d"},
        ),
    ],
)
def test_the_headers_of_the_file_are_read_line_by_line(
    tmp_path: Path, text: str, found: dict[str, str]
) -> None:
    assert HeadersFile(written(tmp_path, text)).read() == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"A: b\nno header {SECRET}", "line 2 is not a header"),
        (f"A : {SECRET}", "line 1 is not a header"),
        (f"A: {SECRET}\x7f", "line 1 is not a header"),
        ("A:", "line 1 is not a header"),
        (f"# one\n\nHost: {SECRET}", "line 3: Host is set by cachd itself"),
        (f"range: {SECRET}", "line 1: range is set by cachd itself"),
        (f"If-Match: {SECRET}", "line 1: If-Match is set by cachd itself"),
        (f"A: {SECRET} é", "cannot be read: not ASCII text"),
        (f"A: {SECRET}" + "x" * headers.LONGEST_BYTES, "cannot be read: "),
    ],
)
def test_a_line_that_cannot_be_sent_is_named_and_its_value_is_not(
    tmp_path: Path, text: str, why: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(Invalid) as refusal:
        HeadersFile(file).read()
    assert refusal.value.code == "bad_secret"
    assert f"headers_file {file} {why}" in refusal.value.detail
    assert "not ASCII" in why or "not ASCII" not in refusal.value.detail
    assert SECRET not in str(refusal.value)
    assert refusal.value.hint


def test_as_many_headers_are_read_as_the_limit_says_and_no_more(tmp_path: Path) -> None:
    lines = [f"A-{number}: b" for number in range(MAX_HEADERS)]
    assert len(HeadersFile(written(tmp_path, "\n".join(lines))).read()) == MAX_HEADERS
    with pytest.raises(Invalid, match=f"line {MAX_HEADERS + 1} is not a header, or goes beyond"):
        HeadersFile(written(tmp_path, "\n".join([*lines, "one: more"]))).read()


@pytest.mark.parametrize("reader", [HeadersFile, QueryFile])
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, reader: type[HeadersFile] | type[QueryFile]
) -> None:
    with pytest.raises(Invalid, match=r"cannot be read: No such file") as refusal:
        reader(tmp_path / "absent").read()
    assert (refusal.value.code, refusal.value.hint) == ("bad_secret", "check the path and its mode")


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ""), (" \n", ""), ("?", ""), ("a=b&c=%20d\n", "a=b&c=%20d"), ("?a=b", "a=b"), ("??a", "?a")],
)
def test_the_query_of_the_file_has_no_question_mark_before_it(tmp_path: Path, text: str, found: str) -> None:
    assert QueryFile(written(tmp_path, text)).read() == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{SECRET}=a b", "is not one line"),
        (f"{SECRET}\nb", "is not one line"),
        (f"{SECRET}#b", "is not one line"),
        (f"{SECRET}=é", "cannot be read: not ASCII text"),
        (SECRET + "x" * query.LONGEST_BYTES, "cannot be read: "),
    ],
)
def test_a_query_that_cannot_be_sent_is_refused_and_not_shown(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(Invalid) as refusal:
        QueryFile(written(tmp_path, text)).read()
    assert refusal.value.code == "bad_secret"
    assert why in refusal.value.detail
    assert "not ASCII" in why or "not ASCII" not in refusal.value.detail
    assert SECRET not in str(refusal.value)
