"""Every test, in the turns that a machine allows: `python -m tests`, as `make test` has it.

    side by side   several processes (pytest-xdist)
    alone          one by one: tests that measure time or bandwidth, or take what a machine has once
    namespace      where the user may not mount: the tests that want to, as root of a user namespace

Arguments are pytest's: `python -m tests -k resume`. The exit status is 0 if no test failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ground.needs import NAMESPACE, lack_of, user_namespace_lacking
from tests.ground.report import FAILED, PASSED, SKIPPED, Tally, ending, read

PROJECT = Path(__file__).parent.parent
NO_TESTS, BROKEN_OFF = 5, 2  # of pytest's statuses
WORKERS_PER_CORE = 2  # tests wait for each other's half of a conversation, too


@dataclass
class Run:
    """All turns of one run: what became of each test, and whether each pytest went well."""

    place: Path
    tally: Tally = field(default_factory=dict)
    went_well: bool = True

    def turn(self, said: str, *options: str, before: Sequence[str] = ()) -> None:
        """One pytest. What it says of a test replaces what an earlier turn said.

        Exits with it when it was interrupted, or could not read the tests.
        """
        print(f"\n--- {said}", flush=True)
        file = self.place / "tally.json"
        file.unlink(missing_ok=True)
        pytest = [sys.executable, "-m", "pytest", "-q", f"--tally={file}"]
        ended = subprocess.run([*before, *pytest, *options], cwd=PROJECT)
        if ended.returncode == BROKEN_OFF:
            sys.exit(BROKEN_OFF)
        self.tally |= read(file)
        self.went_well &= ended.returncode in (0, NO_TESTS)

    def wanting_to_mount(self) -> list[str]:
        """The tests that were skipped, and that a user namespace may run."""
        lacks = {name: lack_of(o.why) for name, o in self.tally.items() if o.word == SKIPPED}
        return [name for name, lack in lacks.items() if lack and lack.may_be_in_a_namespace]


def files_with_alone(arguments: Sequence[str]) -> list[str]:
    """The files whose tests may be alone, so that no other is imported; none where arguments name files."""
    if any(Path(PROJECT, argument.partition("::")[0]).exists() for argument in arguments):
        return []
    files = sorted((PROJECT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.alone(" in path.read_text()]


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, lambda *_: None)  # pytest, which gets it too, says what it interrupted
    with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as place:
        run = Run(Path(place))
        workers = max(2, round(WORKERS_PER_CORE * len(os.sched_getaffinity(0))))
        side_by_side = ("-m", "not alone", f"--numprocesses={workers}", "--dist=worksteal")
        run.turn(f"side by side, in {workers} processes", *side_by_side, *arguments)
        run.turn("alone, one by one", "-m", "alone", *arguments, *files_with_alone(arguments))
        if (left := run.wanting_to_mount()) and (reason := user_namespace_lacking()):
            print(f"there can be no user namespace to mount in: {reason}")
        elif left:
            names = Path(place) / "names"
            names.write_text("\n".join(left))
            own = f"--basetemp={place}/root"  # not that of the machine's root, whose name it has there
            run.turn("in a user namespace, where this user may mount", f"@{names}", own, before=NAMESPACE)
    print(*ending(run.tally), sep="\n")
    words = Counter(outcome.word for outcome in run.tally.values())
    print(f"\n{words[PASSED]} passed, {words[FAILED]} failed, {words[SKIPPED]} skipped")
    return 0 if run.went_well and not words[FAILED] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
