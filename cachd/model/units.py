"""Reads sizes, rates, times and percentages as people write them.

    size   NUMBER [k|M|G|T|P][i] [B|bytes]        500GB  500 gb  1.5TiB  500G  1_000_000  1e9
    rate   a size [/s]; in bits if written so      500MB/s  500MB  1Gbps  100 Mbit/s
    time   NUMBER [w|d|h|m|s|ms] ..., largest first 90m  1h30m  2 days  1.5h  30

An `i` makes the unit binary. A number alone is bytes, bytes a second or seconds. Every function raises
ValueError for a wrong or ambiguous value, with the value and the accepted forms.
"""

from __future__ import annotations

import re
from decimal import Decimal

from cachd.model.limits import Percentage, SizeOrPercent

_LONGEST_TEXT = 40
_LONGEST_SHOWN = 22
_MOST = (1 << 63) - 1
_MAX_SECONDS = 10**9  # some thirty years, which fits every timeout of the system
_SIZES = "a size, such as 500GB, 1.5TiB or a number of bytes"
_RATES = "a rate, such as 500MB/s, 4Gbit/s or a number of bytes a second"
_TIMES = "a time, such as 30s, 1h30m, 2 days or a number of seconds"
_PERCENTAGES = "a percentage, such as 95%"
_SIZES_OR_PERCENTAGES = "a size or a percentage, such as 500GB or 20%"

_NUMBER = r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)"
_SIZE = re.compile(rf"{_NUMBER} *([kmgtp]i?)?(?:b|bytes?)?", re.IGNORECASE)
_RATE = re.compile(
    rf"{_NUMBER} *([kmgtp]i?)?(?:(bps)|(bits?|bytes?|b)?(?: ?/ ?s(?:ec(?:ond)?)?)?)", re.IGNORECASE
)
_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?) *%")
_SECONDS = {
    "w(?:eeks?)?": Decimal(604800),
    "d(?:ays?)?": Decimal(86400),
    "h(?:(?:ou)?rs?)?": Decimal(3600),
    "m(?:in(?:ute)?s?)?": Decimal(60),
    "s(?:ec(?:ond)?s?)?": Decimal(1),
    "ms": Decimal("0.001"),
}
_TIME = re.compile("".join(rf"(?:{_NUMBER} *{unit}(?![a-z]) *)?" for unit in _SECONDS), re.IGNORECASE)


def bytes_of(value: object) -> int:
    """The bytes of a size such as `500GB`."""
    found = _SIZE.fullmatch(_text(value))
    if not found:
        raise _wrong(value, _SIZES)
    return _rounded_bytes(Decimal(found[1]) * _factor(found[2]), value, _SIZES)


def rate_of(value: object) -> int:
    """The bytes a second of a rate such as `500MB/s`."""
    found = _RATE.fullmatch(_text(value))
    if not found:
        raise _wrong(value, _RATES)
    number, prefix, per_second, unit = found.groups(default="")
    if per_second not in ("", "bps", "Bps") or (unit == "b" and prefix[:1].isupper()):
        raise ValueError(
            f"{shown(value)} may mean bits or bytes: write {number}{prefix}bit/s or {number}{prefix}B/s"
        )
    in_bits = per_second == "bps" or unit.lower().startswith("bit")
    return _rounded_bytes(Decimal(number) * _factor(prefix) / (8 if in_bits else 1), value, _RATES)


def seconds_of(value: object) -> float:
    """The seconds of a time such as `1h30m`."""
    text = _text(value)
    if re.search(r"[0-9] *M(?![A-Za-z])", text):
        raise ValueError(f"{shown(value)} may mean minutes or months: write 5m for minutes, 30d for days")
    found = _TIME.fullmatch(text)
    if re.fullmatch(_NUMBER, text, re.IGNORECASE):
        seconds = Decimal(text)
    elif text and found:
        counts = zip(found.groups("0"), _SECONDS.values(), strict=True)
        seconds = sum((Decimal(count) * each for count, each in counts), Decimal(0))
    else:
        raise _wrong(value, _TIMES)
    if seconds > _MAX_SECONDS:
        raise ValueError(f"{shown(value)} is longer than thirty years")
    return float(seconds)


def percentage_of(value: object) -> Percentage:
    """The percentage of a text such as `20%`."""
    found = _PERCENTAGE.fullmatch(_text(value))
    if isinstance(value, Percentage):
        return value
    if not found:
        raise _wrong(value, _PERCENTAGES)
    return Percentage(float(found[1]))


def size_or_percent_of(value: object) -> SizeOrPercent:
    """A percentage of the disk such as `20%`, or the bytes of a size such as `500GB`."""
    if isinstance(value, Percentage) or "%" in _text(value):
        return percentage_of(value)
    try:
        return bytes_of(value)
    except ValueError:
        raise _wrong(value, _SIZES_OR_PERCENTAGES) from None


def shown(value: object) -> str:
    """A wrong value as an error may show it. A long text is not shown: it may be a misplaced token."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST_SHOWN else f"a text of {len(value)} characters"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, int | float):
        return f"{value:.15g}" if abs(value) <= _MOST or value != value else "a huge number"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else "it"


def count_text(number: int, thing: str, things: str = "") -> str:
    """A number of things. `things`: the plural if it is not `thing` with an s."""
    return f"{number} {thing}" if number == 1 else f"{number} {things or f'{thing}s'}"


def _text(value: object) -> str:
    """A text or a number as text; empty for any other value, and for a text that is too long."""
    if isinstance(value, str) and len(value) <= _LONGEST_TEXT:
        return value.strip()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and abs(value) <= _MOST else ""  # type: ignore[arg-type]


def _factor(prefix: str | None) -> int:
    if not prefix:
        return 1
    base, power = 1024 if len(prefix) > 1 else 1000, "kmgtp".index(prefix[0].lower()) + 1
    return int(base**power)


def _rounded_bytes(amount: Decimal, value: object, forms: str) -> int:
    """An amount rounded down to bytes, but to no less than 1 unless it is 0, which may mean no limit."""
    if amount > _MOST:
        raise ValueError(f"{shown(value)} is more than any disk or network has")
    if amount % 1 and _text(value).replace(".", "").replace("_", "").isdigit():
        raise _wrong(value, forms)
    return max(int(amount), 1 if amount else 0)


def _wrong(value: object, forms: str) -> ValueError:
    return ValueError(f"{shown(value)} is not {forms}")
