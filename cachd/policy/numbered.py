"""Finds numbered sets of weights with a gap: `model-00001-of-00003.safetensors` without the other two.

Two forms do not say how many files there are: `consolidated.00.pth`, of which there may be one, and
`m.gguf-split-a`, of which there are two or more. For these, a file after the last one cannot be known to be
missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

_SUFFIX = r"safetensors|bin|gguf|ggml|pt|pth|ckpt|msgpack|h5"
_NUMBERED = re.compile(
    rf"(?P<before>.*[-._])(?P<n>\d{{1,9}})-of-(?P<of>\d{{1,9}})(?P<after>(?:\.[\w-]+)?\.(?:{_SUFFIX}))"
    rf"|(?P<before2>.*\.(?:{_SUFFIX})[-.]part)(?P<n2>\d{{1,9}})of(?P<of2>\d{{1,9}})",
    re.A | re.I | re.DOTALL,
)
_CONSOLIDATED = re.compile(
    r"(?P<before>(?:.*/)?consolidated\.)(?P<n>\d\d)(?P<after>\.(?:pth|safetensors))", re.A
)
_LETTERED = re.compile(rf"(?P<before>.*\.(?:{_SUFFIX})-split-)(?P<letter>[a-z])", re.A | re.I | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Gap:
    """A numbered set that is not complete.

    `present`: the files that it has. `of`: how many it should have. `missing`: how many it lacks. `absent`:
    the first of those.
    """

    present: tuple[str, ...]
    of: int
    missing: int
    absent: tuple[str, ...]


def gaps(paths: Iterable[str], *, most: int) -> list[Gap]:
    """The numbered sets among `paths` with a gap, sorted, each with at most `most` of the absent paths.

    A set counts from 1, or from 0 if it has a file 0. Sharded files of several widths (`-1-of-12`) are one
    set. A number beyond the last one is no part of a set.
    """
    sets: dict[tuple[str, str, str, str], dict[int, str]] = defaultdict(dict)
    all_paths = list(paths)
    for path in all_paths:
        if found := _NUMBERED.fullmatch(path):
            before, after = found["before"] or found["before2"], found["after"] or ""
            number, of = found["n"] or found["n2"], found["of"] or found["of2"]
            if int(number) <= int(of):
                between = "-of-" if found["of"] else "of"
                sets[before, between, of, after][int(number)] = number
    found_gaps = [gap for key, numbers in sets.items() if (gap := _gap(key, numbers, most))]
    return sorted([*found_gaps, *_without_total(all_paths, most)], key=lambda gap: gap.present)


def _without_total(paths: Iterable[str], most: int) -> Iterator[Gap]:
    """Yields the sets with a gap whose names do not say how many files there are."""
    sets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for path in paths:
        if found := _CONSOLIDATED.fullmatch(path):
            sets[found["before"], found["after"]][int(found["n"])] = path
        elif found := _LETTERED.fullmatch(path):
            sets[found["before"], ""][ord(found["letter"].lower()) - ord("a")] = path
    for (before, after), numbers in sets.items():
        total = max(max(numbers) + 1, 1 if after else 2)
        names = (f"{n:02}" if after else chr(ord("a") + n) for n in range(total) if n not in numbers)
        absent = [f"{before}{name}{after}" for name in names]
        if absent:
            present = tuple(numbers[number] for number in sorted(numbers))
            yield Gap(present, total, len(absent), tuple(absent[:most]))


def _gap(key: tuple[str, str, str, str], numbers: dict[int, str], most: int) -> Gap | None:
    before, between, of, after = key
    total = int(of)
    first, last = (0, total - 1) if 0 in numbers and total not in numbers else (1, total)
    expected = range(first, last + 1)
    count = len(expected) - sum(1 for number in numbers if number in expected)
    if not count:
        return None
    padded = [len(text) for text in numbers.values() if text.startswith("0")]
    width = max(padded, default=0)
    absent = islice((number for number in expected if number not in numbers), most)
    return Gap(
        tuple(f"{before}{numbers[number]}{between}{of}{after}" for number in sorted(numbers)),
        total,
        count,
        tuple(f"{before}{number:0{width}}{between}{of}{after}" for number in absent),
    )
