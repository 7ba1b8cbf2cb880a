"""How a run ends: what was skipped for want of something, how to get it, and which tests took too long.

A pytest plugin; conftest registers it. With `--tally FILE` it writes what became of each test there and is
silent, for whoever runs several pytests and reports once (tests/__main__.py).
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.ground.needs import NEEDS, lack_of

LONG_SECONDS, MAX_NAMED = 30.0, 5
LONG_TESTS = Path(__file__).parent.parent / "long.toml"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(slots=True)
class Outcome:
    """What became of a test: PASSED, FAILED or SKIPPED, why it was skipped, its seconds in all phases."""

    word: str = PASSED
    why: str = ""
    seconds: float = 0.0


Tally = dict[str, Outcome]  # by the test's node id


class Reporter:
    """The plugin."""

    def __init__(self, tally_file: Path | None) -> None:
        self._tally_file = tally_file
        self._tally: Tally = defaultdict(Outcome)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self._tally[report.nodeid]
        outcome.seconds += report.duration
        if report.failed:
            outcome.word = FAILED
        elif report.skipped and outcome.word != FAILED:
            outcome.word = SKIPPED
            outcome.why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._tally_file is not None:
            write(self._tally_file, self._tally)
            return
        for line in ending(self._tally):
            terminalreporter.write_line(line)


def write(file: Path, tally: Tally) -> None:
    file.write_text(json.dumps({name: asdict(outcome) for name, outcome in tally.items()}))


def read(file: Path) -> Tally:
    """What `write` wrote; nothing where it wrote none."""
    if not file.exists():
        return {}
    return {name: Outcome(**outcome) for name, outcome in json.loads(file.read_text()).items()}


def ending(tally: Tally) -> Iterator[str]:
    """The lines a run ends with."""
    yield from _too_long(tally, tomllib.loads(LONG_TESTS.read_text()))
    yield from _skipped(tally)


def _too_long(tally: Tally, listed: Mapping[str, str]) -> Iterator[str]:
    """The longest of those that are not listed. On a busy machine there are many: the others are counted."""
    long = [n for n, o in tally.items() if o.seconds > LONG_SECONDS and n.partition("[")[0] not in listed]
    long.sort(key=lambda name: -tally[name].seconds)
    for name in long[:MAX_NAMED]:
        yield f"took {tally[name].seconds:.0f} s and is not listed in {LONG_TESTS.name}: {name}"
    if len(long) > MAX_NAMED:
        yield f"and {len(long) - MAX_NAMED} more took over {LONG_SECONDS:.0f} s"


def _skipped(tally: Tally) -> Iterator[str]:
    """One line for each thing that lacks or other reason, and one that installs all that packages bring."""
    whys = sorted(outcome.why for outcome in tally.values() if outcome.word == SKIPPED)
    lacks = {lack.name: lack for why in whys if (lack := lack_of(why))}
    counts = Counter(lack.name if (lack := lack_of(why)) else why.removeprefix("Skipped: ") for why in whys)
    for name, count in sorted(counts.items()):
        lack = lacks.get(name)
        said = f"{name} ({NEEDS[name].what}): {lack.reason:.200}" if lack else name
        yield f"skipped {count:3} for want of {said}" if lack else f"skipped {count:3}: {said}"
    if missing := {NEEDS[name].debian for name, lack in lacks.items() if lack.may_be_installed}:
        yield f"to run them, too: apt-get install {' '.join(sorted(missing))}"
