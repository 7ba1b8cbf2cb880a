"""What marks the version of a file, in the forms that servers send."""

from __future__ import annotations

import pytest

from cachd.sources.validators import differ, precondition, validator, weak_tag

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
SAME = [DATE, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", "1994-11-06T08:49:37Z"]

MARKS: dict[str, tuple[dict[str, str], str | None]] = {
    "a strong tag": ({"ETag": '"one"', "Last-Modified": DATE}, '"one"'),
    "no quotes": ({"ETag": "6544d1-5f3a", "Last-Modified": DATE}, "6544d1-5f3a"),
    "a weak tag": ({"ETag": 'W/"one"', "Last-Modified": DATE}, DATE),
    "an empty tag": ({"ETag": '""', "Last-Modified": DATE}, DATE),
    "any tag": ({"ETag": "*"}, None),
    "two tags": ({"ETag": '"one", "two"'}, None),
    "words": ({"ETag": "not a tag"}, None),
    "a future date": ({"Last-Modified": "Fri, 06 Nov 2099 08:49:37 GMT"}, "Fri, 06 Nov 2099 08:49:37 GMT"),
    "the epoch": ({"Last-Modified": "Thu, 01 Jan 1970 00:00:01 GMT"}, None),
    "the first day of zip": ({"Last-Modified": "Tue, 01 Jan 1980 00:00:00 GMT"}, None),
    "garbage": ({"Last-Modified": "yesterday"}, None),
    "a number": ({"Last-Modified": "-1"}, None),
    "a year without end": ({"Last-Modified": "Sun, 06 Nov 99999 08:49:37 GMT"}, None),
    "nothing": ({}, None),
    **{f"the date {date}": ({"Last-Modified": date}, date) for date in SAME},
}


@pytest.mark.parametrize(("headers", "mark"), MARKS.values(), ids=MARKS.keys())
def test_a_file_is_marked_by_its_tag_or_its_date(headers: dict[str, str], mark: str | None) -> None:
    assert validator(headers) == mark


@pytest.mark.parametrize("one", SAME)
@pytest.mark.parametrize("other", SAME)
def test_a_date_is_the_same_in_every_form(one: str, other: str) -> None:
    assert not differ(one, other)
    assert differ(one, "Sun, 06 Nov 1994 08:49:38 GMT")


@pytest.mark.parametrize(("one", "other"), [('"one"', '"two"'), ("abcd", '"abcd"'), ('"one"', DATE)])
def test_tags_are_the_same_only_to_the_letter(one: str, other: str) -> None:
    assert differ(one, other)
    assert not differ(one, one)


def test_only_what_every_server_reads_is_sent_back() -> None:
    assert precondition('"one"') == {"If-Match": '"one"'}
    assert precondition(DATE) == {"If-Unmodified-Since": DATE}
    for mark in (None, "6544d1-5f3a", *SAME[1:]):
        assert precondition(mark) == {}


@pytest.mark.parametrize(
    ("tag", "found"),
    [('W/"one"', 'W/"one"'), ('"one"', ""), ("", ""), (None, ""), ('W/""', ""), (f'W/"{"x" * 201}"', "")],
)
def test_a_weak_tag_is_known_as_one(tag: str | None, found: str) -> None:
    assert weak_tag({"ETag": tag} if tag is not None else {}) == found


@pytest.mark.parametrize(
    ("date", "is_mark"),
    [
        ("Thu, 01 Jan 1981 00:00:00 GMT", True),
        ("Wed, 31 Dec 1980 23:59:59 GMT", False),
        ("1981-01-01T00:00:00", True),
    ],
)
def test_a_date_of_1981_or_later_marks_a_version(date: str, is_mark: bool) -> None:
    assert validator({"Last-Modified": date}) == (date if is_mark else None)


def test_dates_of_which_one_is_none_differ() -> None:
    assert differ(DATE, "yesterday")
    assert differ("yesterday", DATE)
    assert differ("yesterday", "tomorrow")
    assert not differ("1994-11-06T08:49:37", DATE), "without a zone it is in UTC"
