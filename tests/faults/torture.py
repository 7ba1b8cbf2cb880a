"""The long campaign: python -m tests.faults.torture [--minutes 10] [--seed 0] [--json FILE]

cachd is killed before and after its Nth system call, and killed again while it recovers; its Nth call fails
in each way a disk fails; all of it fails at random, the origins too. After each, the next life must find
every promise kept and do all its work; a reader in another mount namespace checks whatever is ready all
the time. It ends with one table, and with status 1 if there was a violation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cachd.errors import CachdError
from tests.faults import oracle
from tests.faults.children import in_child
from tests.faults.injection import ERRORS, KILLS, Injection, Plan, Tally
from tests.faults.lives import (
    ORIGIN_FAULTS,
    Digests,
    Life,
    Origins,
    known_manifests,
    left_over,
    opened,
    states,
    visible,
)
from tests.ground import pod

KILLED_AGAIN = 14  # in a row, while it recovers or soon after
STORMY_LIVES = 8  # most steps of such a one end early
LIVES = 2  # in one case: the second begins with everything there


@dataclass(slots=True)
class Outcome:
    """What a campaign did and saw."""

    cases: int = 0
    calls: int = 0  # of an untouched case
    tried: dict[str, int] = field(default_factory=dict)  # of its calls over an empty root, by kind
    faults: dict[str, int] = field(default_factory=dict)
    looked: int = 0
    mapped: int = 0
    held: int = 0
    moved: int = 0
    again: int = 0
    longest_recovery: float = 0.0
    violations: list[str] = field(default_factory=list)

    def join(self, other: Outcome) -> None:
        self.cases += other.cases
        self.calls = max(self.calls, other.calls)
        self.looked += other.looked
        self.mapped += other.mapped
        self.held += other.held
        self.moved += other.moved
        self.again += other.again
        self.longest_recovery = max(self.longest_recovery, other.longest_recovery)
        self.violations += other.violations
        for mine, theirs in ((self.faults, other.faults), (self.tried, other.tried)):
            for kind, number in theirs.items():
                mine[kind] = mine.get(kind, 0) + number

    @property
    def kills(self) -> int:
        return sum(self.faults.get(kind, 0) for kind in KILLS)


class Campaign:
    """Cases over roots below one directory, one after the other, until the time is over.

    `share` of `shares`: which of the Ns it tries. Everything follows from `seed` but the threads' own order.
    """

    def __init__(self, place: Path, *, seed: int, share: int = 0, shares: int = 1) -> None:
        self._place, self._share, self._shares = place, share, shares
        self._chosen = random.Random(f"{seed}/{share}")
        self._root = place / "root"
        self._known: dict[str, Digests] = {}
        self._tally = Tally()
        self._recovery = multiprocessing.RawValue("d", 0.0)
        self._clean_bytes = 0
        self.outcome = Outcome()

    def run(self, deadline: float, rounds: int | None = None) -> Outcome:
        with ExitStack() as stack:
            self._origins = Origins()
            stack.callback(self._origins.close)
            self._learn()
            reader = stack.enter_context(pod.pod(self._place, oracle.SCRIPT))
            self._kill_and_fail(deadline, rounds)
            told = oracle.verdict(reader)
            self.outcome.looked, self.outcome.mapped = told["looked"], told["mapped"]
            self.outcome.held = told["held"]
            self.outcome.violations += told["violations"]
            self.outcome.moved = self._origins.sent()
            self.outcome.faults = {**self._tally.faults(), **self._origins.faults()}
        return self.outcome

    def _learn(self) -> None:
        """A case that nothing happens to: what each manifest holds, how many calls and bytes it takes."""
        self._fresh()
        plan = Plan("EIO", sys.maxsize)

        def life() -> list[str]:
            known: dict[str, Digests] = {}
            Injection(self._root, plan, self._tally)
            with opened(self._root, self._origins) as parts:
                for _ in range(LIVES):
                    life = Life(parts, self._origins, pulled=lambda m: known_manifests(self._root, m, known))
                    life.run()
                    assert not life.errors, life.errors
            oracle.write_known(self._place, known)
            return left_over(self._root)

        self._child("untouched", life)
        if self.outcome.violations:
            raise RuntimeError(f"a case that nothing happens to: {self.outcome.violations}")
        self._known = json.loads((self._place / oracle.KNOWN).read_bytes())
        self._look("untouched")
        self.outcome.calls = self._tally.calls
        self._clean_bytes = self._origins.sent()

    def _kill_and_fail(self, deadline: float, rounds: int | None) -> None:
        """Round after round: killed before a call and after one, one of the errors, a storm.

        Each N comes once a kind, in no order, so that a short campaign has been everywhere, too.
        """
        calls = range(self._share, self.outcome.calls, self._shares)
        left = {kind: self._chosen.sample(calls, len(calls)) for kind in (*KILLS, *ERRORS)}
        errors = cycle(ERRORS)
        for _ in count() if rounds is None else range(rounds):
            if time.monotonic() > deadline:
                break
            for kind in (*KILLS, next(errors)):
                if left[kind] and time.monotonic() < deadline:
                    self._case(Plan(kind, left[kind].pop()))
            self._storm()
        self.outcome.tried = {kind: len(calls) - len(numbers) for kind, numbers in left.items()}

    # --- cases ---

    def _case(self, plan: Plan) -> None:
        """One plan over an empty root, then the lives after it."""
        self.outcome.cases += 1
        self._fresh()
        label = str(plan)
        sent = self._origins.sent()
        self._lives(label, plan)
        for _ in range(KILLED_AGAIN if plan.kind in KILLS else 0):
            again = Plan(self._chosen.choice(KILLS), self._chosen.randrange(self._chosen.choice((60, 600))))
            label += f", then {again}"
            self._child(label, partial(self._live, again, 1), killed=True)
            self._look(label)
        self._recover(label)
        self.outcome.again += max(0, self._origins.sent() - sent - self._clean_bytes)

    def _storm(self) -> None:
        """Lives in which anything fails at random, the origins too, over an empty root."""
        self.outcome.cases += 1
        self._fresh()
        at = self._chosen.randrange(self.outcome.calls // 8)
        plan = Plan(self._chosen.choice(ERRORS[:5]), at, 0.03, self._chosen.randrange(1 << 30))
        spoilt = self._chosen.sample(sorted(ORIGIN_FAULTS), 4)
        for fault in spoilt:
            self._origins.spoil(fault, self._chosen.randrange(1, 4))
        label = f"storm: {plan}, origin: {', '.join(spoilt)}"
        self._lives(label, plan, STORMY_LIVES)
        self._origins.clear()
        self._recover(label)

    def _lives(self, label: str, plan: Plan, lives: int = LIVES) -> None:
        self._child(label, lambda: self._live(plan, lives), killed=plan.kind in KILLS)
        self._look(label)

    def _live(self, plan: Plan, lives: int) -> list[str]:
        """Lives with the plan at work; then, without a restart, one in which nothing fails."""
        self._tally.forget_calls()
        injection = Injection(self._root, plan, self._tally)
        try:
            with opened(self._root, self._origins) as parts:
                for _ in range(lives):
                    Life(parts, self._origins).run()
                injection.over()
                self._origins.clear()
                life = Life(parts, self._origins)
                life.run()
                return [f"not mended without a restart: {error!r}" for error in life.errors]
        except CachdError:  # it did not start: the next one must
            return []

    def _recover(self, label: str) -> None:
        """A life in which nothing fails: it ends what was begun, does everything, and leaves nothing over."""
        began = time.monotonic()

        def life() -> list[str]:
            with opened(self._root, self._origins) as parts:
                life = Life(parts, self._origins)
                life.resumed()
                self._recovery.value = max(self._recovery.value, time.monotonic() - began)
                life.run()
                found = [f"after the restart: {error!r}" for error in life.errors]
                if (seen := states(parts)) != {"m": "ready", "c": "ready"}:
                    found.append(f"states {seen}")
            return found + left_over(self._root)

        self._child(label, life)
        self._look(label)
        self.outcome.longest_recovery = self._recovery.value

    # --- ground ---

    def _fresh(self) -> None:
        """An empty root; the old one goes in one step, so that the reader sees it or not."""
        old = self._place / ".old"
        if self._root.exists():
            self._root.rename(old)
            for directory, _, _ in os.walk(old):
                os.chmod(directory, 0o755)  # only root may take a file out of a directory that is read-only
            shutil.rmtree(old)
        self._root.mkdir(mode=0o755)

    def _look(self, label: str) -> None:
        self.outcome.violations += [f"{label}: {line}" for line in visible(self._root, self._known)]

    def _child(self, label: str, work: Callable[[], list[str]], *, killed: bool = False) -> None:
        """Do `work` in a forked child: each line it gives is a violation, as is any end but the expected."""
        ended = in_child(work)
        if ended.signal and not (ended.killed and killed):
            self.outcome.violations.append(f"{label}: ended by signal {ended.signal}")
        self.outcome.violations += [f"{label}: {line}" for line in ended.told]


def run(minutes: float, rounds: int | None, seed: int, workers: int, place: Path) -> Outcome:
    """Campaigns side by side, a process each. Raises RuntimeError when one of them dies."""
    deadline = time.monotonic() + 60 * minutes
    outcome = Outcome()
    running: dict[int, Path] = {}
    sys.stdout.flush()
    for share in range(workers):
        directory = place / str(share)
        directory.mkdir(mode=0o755)
        told = place / f"{share}.json"
        child = os.fork()
        if not child:
            status = 1
            try:
                found = Campaign(directory, seed=seed, share=share, shares=workers).run(deadline, rounds)
                told.write_text(json.dumps(as_document(found)))
                status = 0
            except BaseException:  # noqa: BLE001 - a forked child must end here
                traceback.print_exc()
            os._exit(status)
        running[child] = told
    for child, told in running.items():
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"a campaign ended with {status}")
        outcome.join(Outcome(**json.loads(told.read_bytes())))
    return outcome


def as_document(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__slots__}


def table(outcome: Outcome, seed: int) -> Table:
    shown = Table(title=f"torture, seed {seed}", title_justify="left", show_header=False)
    tried = ", ".join(f"{kind} {n}" for kind, n in sorted(outcome.tried.items()))
    rows = (
        ("cases", f"{outcome.cases}"),
        ("system calls of an untouched case", f"{outcome.calls}"),
        ("kill points tried", f"{outcome.kills}"),
        ("faults injected", f"{sum(outcome.faults.values())}"),
        ("  of them", ", ".join(f"{n} {kind}" for kind, n in sorted(outcome.faults.items()))),
        ("  of these calls, over an empty root", tried),
        ("bytes moved", f"{outcome.moved / 1e9:.2f} GB"),
        ("fetched again", f"{outcome.again / 1e9:.2f} GB"),
        ("longest recovery", f"{outcome.longest_recovery:.2f} s"),
        ("reader: ready models checked", f"{outcome.looked}"),
        ("reader: mapped files checked", f"{outcome.mapped}"),
        ("reader: looks at held snapshots", f"{outcome.held}"),
        ("violations", f"{len(outcome.violations)}"),
    )
    for row in rows:
        shown.add_row(*row)
    return shown


@contextmanager
def memory_or_disk(on_disk: bool) -> Iterator[Path]:
    """An empty directory that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="torture-", dir=None if on_disk else "/dev/shm") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def main() -> None:
    about = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser("python -m tests.faults.torture", description=about)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, help="end after so many, if the minutes are not over before")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of an earlier campaign")
    parser.add_argument("--workers", type=int, default=1 + (os.cpu_count() or 1))
    parser.add_argument(
        "--disk", action="store_true", help="over the disk of the temporary files, not memory"
    )
    parser.add_argument("--json", type=Path, help="write what was seen there, too")
    asked = parser.parse_args()
    with memory_or_disk(asked.disk) as place:
        outcome = run(asked.minutes, asked.rounds, asked.seed, asked.workers, place)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table(outcome, asked.seed))
    for line in outcome.violations:
        console.print(f"violation: {line}", markup=False, style="red")
    if asked.json:
        asked.json.write_text(json.dumps(as_document(outcome), indent=1))
    if outcome.violations:
        console.print(f"again: make torture MINUTES={asked.minutes:g} SEED={asked.seed}")
        sys.exit(1)


if __name__ == "__main__":
    main()
