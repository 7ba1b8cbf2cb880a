"""Clock and chance come in as arguments: no module of cachd reads them by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
# What the standard library has of clocks and of chance. `random.Random` and its like hold chance, too.
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
CLOCKS |= {"clock_gettime", "clock_gettime_ns", "localtime", "gmtime", "ctime", "asctime", "strftime"}
CHANCE = {"random": None, "secrets": None, "uuid": {"uuid1", "uuid4"}, "os": {"urandom", "getrandom"}}
DATES = {"now", "utcnow", "today"}


def reads(source: str) -> Iterator[tuple[int, str]]:
    """The line and the name of each direct read of a clock or of chance.

    A default of a parameter or of a dataclass's field is not one: a caller may give another.
    """
    tree = ast.parse(source)
    given = {id(node) for default in _defaults(tree) for node in ast.walk(default)}
    names = _imported(tree)
    for node in ast.walk(tree):
        if id(node) in given or not isinstance(node, ast.Attribute | ast.Name):
            continue
        found = _full_name(node, names)
        if found and _is_read(found):
            yield node.lineno, found


def _defaults(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from node.args.defaults
            yield from (each for each in node.args.kw_defaults if each is not None)
        elif isinstance(node, ast.ClassDef):
            yield from (each.value for each in node.body if isinstance(each, ast.AnnAssign) and each.value)


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name of a module stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def _full_name(node: ast.Attribute | ast.Name, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node.value, ast.Attribute | ast.Name) and (owner := _full_name(node.value, names)):
        return f"{owner}.{node.attr}"
    return None


def _is_read(name: str) -> bool:
    module, _, rest = name.partition(".")
    if module == "datetime":
        return rest.rpartition(".")[2] in DATES
    if module == "time":
        return rest in CLOCKS
    return bool(rest) and module in CHANCE and (CHANCE[module] is None or rest in (CHANCE[module] or ()))


def test_no_module_reads_a_clock_or_chance() -> None:
    found = {
        f"{path.relative_to(PROJECT)}:{line} {name}"
        for path in (PROJECT / "cachd").rglob("*.py")
        for line, name in reads(path.read_text())
    }
    assert not found, "take the clock or the chance as an argument, with a default"


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndef f():\n    return time.monotonic()",
        "import time as t\ndef f():\n    return t.time()",
        "from time import time as seconds\ndef f():\n    return seconds()",
        "import time\nclass A:\n    def __init__(self):\n        self.clock = time.monotonic",
        "from datetime import UTC, datetime\nsince = datetime.now(UTC)",
        "import datetime\nsince = datetime.datetime.now()",
        "import os\nname = os.urandom(8).hex()",
        "import uuid\ndef f():\n    return uuid.uuid4()",
        "import random\ndice = random.Random()",
        "import secrets\ndef f():\n    return secrets.token_hex(8)",
        "from random import choice\ndef f(some):\n    return choice(some)",
    ],
)
def test_a_direct_read_of_a_clock_or_of_chance_is_found(source: str) -> None:
    assert list(reads(source))


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndef f(*, clock=time.monotonic):\n    return clock()",
        "import secrets\ndef f(name=lambda: secrets.token_hex(4)):\n    return name()",
        "import time\nclass A:\n    now: object = time.time",
        "import time\ndef f():\n    time.sleep(1)",
        "import time\nused = time.thread_time() + time.process_time()",
        "from datetime import datetime\nat = datetime.fromtimestamp(0)",
        "from cachd.sources import secrets\nfound = secrets.Secret",
    ],
)
def test_what_a_caller_may_replace_and_what_is_no_clock_is_not_found(source: str) -> None:
    assert not list(reads(source))
