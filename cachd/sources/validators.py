"""Reads what an origin says about the version of a file, in the forms that servers send.

    ETag: "one"      strong: goes into If-Match (RFC 9110, 8.8.3)
    ETag: one        without its quotes: compared, but not sent, as it is no entity tag for other servers
    ETag: W/"one"    weak: does not promise equal bytes, so the date counts (RFC 9110, 8.8.1)
    Last-Modified    a date, in the form of RFC 9110, of RFC 850, of asctime, or of ISO 8601

A date that cannot be parsed, or that lies before 1981, is no validator: builds and archives give the same one
to every version of a file.
"""

from __future__ import annotations

import email.utils
import re
from contextlib import suppress
from datetime import UTC, datetime

from cachd.sources.failures import Headers

_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')
_WEAK = re.compile(r'W/"[\x21\x23-\x7e\x80-\xff]{1,200}"')
_UNQUOTED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=/-]{3,}")
_SENDABLE_DATE = re.compile(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT")
_FIRST_YEAR = 1981


def validator(headers: Headers) -> str | None:
    """The ETag or the date that identifies the version of a file, as it was sent; None without one."""
    tag = headers.get("ETag") or ""
    if _STRONG.fullmatch(tag) or _UNQUOTED.fullmatch(tag):
        return tag
    stated = headers.get("Last-Modified")
    return stated if stated and _date(stated) else None


def weak_tag(headers: Headers) -> str:
    """The weak ETag; empty without one. Another one means another version; the same one proves nothing."""
    found = _WEAK.fullmatch(headers.get("ETag") or "")
    return found[0] if found else ""


def precondition(stated: str | None) -> dict[str, str]:
    """The header that asks only for the version of this validator; none if servers may misread it."""
    if stated and stated.startswith('"'):
        return {"If-Match": stated}
    if stated and _SENDABLE_DATE.fullmatch(stated):
        return {"If-Unmodified-Since": stated}
    return {}


def differ(one: str, other: str) -> bool:
    """Whether two validators are of different versions. Dates are the same in every form."""
    if one == other:
        return False
    first, second = _date(one), _date(other)
    return first is None or first != second


def _date(stated: str) -> datetime | None:
    """The time that a date means; None if it means none, or one that says nothing about the version."""
    found: datetime | None = None
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        found = email.utils.parsedate_to_datetime(stated)
    if found is None:
        with suppress(ValueError):
            found = datetime.fromisoformat(stated)
    if found is None:
        return None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    return found if found.year >= _FIRST_YEAR else None
