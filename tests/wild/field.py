"""A daemon among origins with odd behaviour, and the verdict on each of its pulls.

    with among(place, rows) as field:
        verdict = field.tried("head-says-empty")

A row of a TOML file says who behaves so (`server`), how (`oddity`), what cachd does (`answer`), and the
`outcome`: `ready`, or the code of an error. The function marked `@wild(row)` in the module of the same kind
starts the origin and yields what to pull:

    @wild("head-says-empty")
    def head_says_empty(world: World) -> Iterator[Odd]:
        with RawServer(...) as origin:
            yield Odd(f"{origin.url}/x.bin", {"x.bin": CONTENT})

All origins start first, so that their entries of `sources` are in the configuration of the one daemon, which
then pulls one after the other.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.ground.node import Node
from tests.ground.rows import Rows
from tests.ground.s3 import S3Server

KINDS = ("http", "hub", "s3", "share")
INDEX: dict[str, dict[str, dict[str, Any]]] = {
    kind: tomllib.loads((Path(__file__).parent / f"{kind}.toml").read_text()) for kind in KINDS
}
ROWS: dict[str, dict[str, Any]] = {row: said for rows in INDEX.values() for row, said in rows.items()}
READY = "ready"
DEADLINE_SECONDS = 30.0  # of a row, on a machine that does nothing else
OPTIONS = {"retries": 2, "streams": 8, "stall_seconds": 5, "log_level": "info"}


@dataclass(frozen=True)
class Odd:
    """What to pull from an odd origin: the ref, and the bytes of each file that the model shall have.

    `entries`: entries of the option `sources` that the daemon needs for it. `asked`: more fields of the
    request for the model, such as `include`. `after`: called when the pull has ended; it asserts what
    else holds, such as how many requests the origin had.
    """

    ref: str
    files: Mapping[str, bytes]
    entries: tuple[Mapping[str, Any], ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    after: Callable[[], None] = lambda: None


class World:
    """What a row starts its origin with.

    `share`: a directory of the row alone, which the daemon may read. `s3`: gives a real S3 server, which all
    rows share: use buckets of your own.
    """

    def __init__(self, row: str, place: Path, s3: Callable[[], S3Server]) -> None:
        self.row, self.s3, self._place = row, s3, place
        self.share = place / "share" / row
        self.share.mkdir(parents=True)

    def keys(self, access_key: str = "AKIDSCRIPTED", secret_key: str = "x") -> str:
        """A file of S3 credentials, for the column `credentials` of an entry; by default, of `Bucket`."""
        path = self._place / f"keys-{self.row}"
        path.write_text(
            f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"
        )
        return str(path)


Row = Callable[[World], Iterator[Odd]]
WILD = Rows[Row]()
wild = WILD.row  # registers what behaves as this row says


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one pull. `found`: `ready`, the code of an error, or `hangs`."""

    row: str
    found: str
    detail: str
    seconds: float
    failure: str = ""

    @property
    def is_right(self) -> bool:
        return not self.failure


class Field:
    """The daemon, and what each row has started. `short`: the code that a retry is logged with decides."""

    def __init__(self, node: Node, odd: Mapping[str, Odd], *, short: bool) -> None:
        self._node, self._odd, self._short = node, odd, short

    def tried(self, row: str) -> Verdict:
        """Pull what the row started, and judge."""
        odd, said, name = self._odd[row], ROWS[row], f"wild-{row}"
        began = time.monotonic()
        answer = self._node.ask("POST", "/v1/models", {"ref": odd.ref, "name": name, **odd.asked})
        if answer.status == 202:
            found, detail = self._outcome(name, said, began + said.get("deadline", DEADLINE_SECONDS))
        else:
            found, detail = str(answer.document["code"]), str(answer.document["detail"])
        failure = self._failure(name, odd, said["outcome"], found, detail)
        try:
            odd.after()
        except AssertionError as error:
            failure = failure or f"{error}"[:400]
        self._node.ask("DELETE", f"/v1/models/{name}?force=true")
        return Verdict(row, found, detail, time.monotonic() - began, failure)

    def _outcome(self, name: str, said: Mapping[str, Any], deadline: float) -> tuple[str, str]:
        """How the pull ends, and the detail of its error."""
        while True:
            shown = self._node.ask("GET", f"/v1/models/{name}").document
            if shown["state"] == READY:
                return READY, ""
            if shown["state"] == "failed":
                error = shown["pull"]["error"]
                return str(error["code"]), f"{error['detail']} ({error.get('hint', '')})"
            if self._short and said["outcome"] in self._retried(name):
                return str(said["outcome"]), "retried later"
            if time.monotonic() > deadline:
                return "hangs", f"{shown['state']}: {shown['pull'].get('waits')}"
            self._node.ask("GET", f"/v1/models/{name}/ready?wait=0.1")

    def _retried(self, name: str) -> set[str]:
        """The codes for which the pull is to be tried again."""
        log = [*self._node.log]
        return {
            str(line["code"])
            for line in log
            if line.get("event") == "resolve will be retried" and line["name"] == name
        }

    def _failure(self, name: str, odd: Odd, wanted: str, found: str, detail: str) -> str:
        """What differs from the row; empty when nothing does."""
        top = self._node.root / "models" / name
        if found != READY:
            wrong = f"a model is published after {found}" if top.exists() else ""
            return wrong or (f"{found}: {detail}" if found != wanted else "")
        there = {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for path in {**odd.files, **there}:
            if odd.files.get(path) != there.get(path):
                sizes = [
                    None if files.get(path) is None else len(files[path]) for files in (odd.files, there)
                ]
                return f"A WRONG MODEL IS READY: {path} has {sizes[1]} bytes of its own, not {sizes[0]}"
        return "" if wanted == READY else f"ready, though {wanted} is expected"


@contextmanager
def among(
    place: Path, rows: Iterable[str], *, short: bool, s3: Callable[[], S3Server] | None = None
) -> Iterator[Field]:
    """Start the origins of the rows, and a daemon that knows the entries they need.

    `s3` gives an S3 server that runs already; without it, one is started for the first row that needs it.
    """
    with ExitStack() as stack:

        @cache
        def started() -> S3Server:
            return stack.enter_context(S3Server(place / "s3"))

        odd = {
            row: stack.enter_context(contextmanager(WILD[row])(World(row, place, s3 or started)))
            for row in dict.fromkeys(rows)
        }
        entries = [dict(entry) for each in odd.values() for entry in each.entries]
        allow = ["127.0.0.0/8", f"file://{place}/share/"]
        options = {**OPTIONS, "allow": allow, "sources": entries}
        node = Node(place / "root", options, CACHD_LOG_LEVEL="info")
        yield Field(stack.enter_context(node), odd, short=short)
