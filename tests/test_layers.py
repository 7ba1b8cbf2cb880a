"""The structure: imports point down, and so do the calls of a pull."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import CodeType, FrameType

import pytest

from cachd.api.app import create_app
from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.daemon.serve import api_services
from cachd.report.events import EventLog
from tests.conftest import spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise

PROJECT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def rows() -> dict[str, int]:
    """Each top-level module of cachd with its row, the highest first, as pyproject.toml draws them."""
    contract = next(c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return {
        module.strip(): row for row, layer in enumerate(contract["layers"]) for module in layer.split("|")
    }


def test_imports_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([linter, "--no-cache"], cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


# What is longer than CONTRIBUTING.md allows, and says why where it stands.
LONG = {"cachd/daemon/parts.py assembled", "cachd/cli/pull.py pull"}
MAX_LINES = {"module": 400, "class": 250, "function": 40}


def test_no_module_class_or_function_is_too_long_for_one_look() -> None:
    long = set()
    for path in (PROJECT / "cachd").rglob("*.py"):
        shown, text = path.relative_to(PROJECT), path.read_text()
        if text.count("\n") > MAX_LINES["module"]:
            long.add(f"{shown}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                most = MAX_LINES["class" if isinstance(node, ast.ClassDef) else "function"]
                if (node.end_lineno or node.lineno) - node.lineno + 1 > most:
                    long.add(f"{shown} {node.name}")
    assert long == LONG


def test_no_constructor_takes_more_than_seven_things() -> None:
    """Eight say that a noun is missing, such as `Timeouts` or `Supply`."""
    found = {}
    for path in (PROJECT / "cachd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                found[f"{path.relative_to(PROJECT)}:{node.lineno}"] = count
    assert found
    assert {place: count for place, count in found.items() if count > 7} == {}


def test_an_import_upward_is_caught(tmp_path: Path) -> None:
    copy = tmp_path / "cachd"
    subprocess.run(["cp", "-r", PROJECT / "cachd", copy], check=True)
    (tmp_path / "pyproject.toml").write_text((PROJECT / "pyproject.toml").read_text())
    with (copy / "store/space.py").open("a") as module:
        module.write("\nfrom cachd.transfer import pull as upward\n")
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "cachd.store.space -> cachd.transfer.pull" in ended.stdout.replace("\n", " ")


TIMER = "cachd.kernel.periodic"  # calls what it was given, as a library does


class Walk:
    """Every call from one module of cachd into another, in all threads, while it is entered."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str]] = set()
        self._modules: dict[CodeType, str] = {}

    def __enter__(self) -> Walk:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _seen(self, frame: FrameType, event: str, _argument: object) -> None:
        callee = self._module(frame) if event == "call" else ""
        if not callee:
            return
        above = frame.f_back
        while above is not None and not self._module(above):  # through contextlib and the like
            above = above.f_back
        if above is not None and self._module(above) not in (callee, TIMER):
            self.calls.add((self._module(above), callee))

    def _module(self, frame: FrameType) -> str:
        code = frame.f_code
        if code not in self._modules:
            name = frame.f_globals.get("__name__", "")
            is_body = code.co_name.startswith("<") or "." not in name  # an expression, not a function
            self._modules[code] = "" if is_body or not name.startswith("cachd.") else name
        return self._modules[code]


def upward(calls: set[tuple[str, str]]) -> set[tuple[str, str]]:
    order = rows()
    return {
        (caller, callee)
        for caller, callee in calls
        if order[caller.split(".")[1]] > order[callee.split(".")[1]]
        or (
            caller.split(".")[1] != callee.split(".")[1]
            and order[caller.split(".")[1]] == order[callee.split(".")[1]]
        )
    }


def test_the_calls_of_a_pull_go_down_the_layers_only(hub: Hub, root: Path) -> None:
    """The data's walk: api -> transfer -> sources and store -> policy -> model; nothing calls back up."""
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": noise(20 << 20)})
    options = Config(root=root, hf_endpoint=hub.url, streams=2, allow=("127.0.0.0/8",), reserve_free=0)
    with Walk() as walk, assembled(options) as parts:
        services = api_services(
            parts, events=EventLog(), required=list, options=dict, sources=lambda _ref: {}
        )
        create_app(services, tokens=None, anonymous_reads=True, allowed_hosts=())
        parts.status.start(parts.models)
        started = parts.pulls.start(spec_of("hf://org/model"))
        assert started is not None
        started.done.result(60)
        parts.models.describe("org--model")
        parts.pulls.delete("org--model")
    assert upward(walk.calls) == set()
    for step in WALK:
        assert step in walk.calls, f"the walk has no step {step}"


WALK: tuple[tuple[str, str], ...] = (
    ("cachd.transfer.pulls", "cachd.transfer.runner"),
    ("cachd.transfer.runner", "cachd.transfer.pull"),
    ("cachd.transfer.resolves", "cachd.sources.huggingface"),
    ("cachd.sources.huggingface", "cachd.model.manifest"),
    ("cachd.transfer.pull", "cachd.transfer.reclaim"),
    ("cachd.transfer.reclaim", "cachd.store.disk_store"),
    ("cachd.store.disk_store", "cachd.store.space"),
    ("cachd.transfer.pull", "cachd.transfer.fetch"),
    ("cachd.transfer.fetch", "cachd.transfer.downloads"),
    ("cachd.transfer.downloads", "cachd.transfer.download.download"),
    ("cachd.transfer.download.assembly", "cachd.policy.parts"),
    ("cachd.transfer.download.assembly", "cachd.store.content.content"),
    ("cachd.store.content.content", "cachd.store.ingest.ingest"),
    ("cachd.sources.huggingface", "cachd.sources.http"),
    ("cachd.transfer.download.supplier", "cachd.sources.response"),
    ("cachd.transfer.download.turn", "cachd.store.ingest.ingest"),
    ("cachd.store.ingest.ingest", "cachd.store.ingest.data_file"),
    ("cachd.store.ingest.data_file", "cachd.kernel.durable"),
    ("cachd.transfer.pull", "cachd.store.publish"),
    ("cachd.store.publish", "cachd.store.pod_views"),
    ("cachd.store.pod_views", "cachd.store.views"),
    ("cachd.store.views", "cachd.kernel.durable"),
)


def test_a_call_upward_would_be_seen() -> None:
    assert upward({("cachd.store.ingest", "cachd.transfer.pull")})
    assert upward({("cachd.store.ingest", "cachd.sources.http")})
    assert not upward({("cachd.transfer.pull", "cachd.store.ingest")})


LATER = {"boto3", "botocore", "huggingface_hub", "httpx2", "awscrt", "aiohttp", "h11"}
LATER |= {"cachd.cluster", "cachd.serve"}
WEB = {"fastapi", "starlette", "uvicorn"}
OPTIONS = {"yaml", "prometheus_client", "structlog"}
TERMINAL = {"asyncio", "rich.console", "rich.table", "rich.progress"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("cachd.daemon.serve",), LATER),
        (("cachd.direct",), LATER | WEB),
        (("cachd.cli",), LATER | WEB | OPTIONS | TERMINAL),
        (("cachd.cli", "cachd.pod.wait"), LATER | WEB | OPTIONS | TERMINAL),
    ],
    ids=["serve", "pull --direct", "help", "wait --cache"],
)
def test_a_start_loads_no_library_before_it_is_needed(modules: tuple[str, ...], absent: set[str]) -> None:
    """Each takes a tenth of a second; the daemon must answer within one."""
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert set(modules) <= loaded
    assert not loaded & absent


def test_no_module_or_function_has_a_name_that_says_nothing() -> None:
    empty = ("util", "helper", "common", "misc", "manager", "service", "process", "info")
    names = [path.stem for path in (PROJECT / "cachd").rglob("*.py")]
    assert not [name for name in names if any(word in name for word in empty)]


LASTING = {
    "write",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "replace",
    "link",
}
LASTING |= {"symlink", "write_bytes", "write_text", "hardlink_to", "symlink_to"}


def lasting_calls(module: Path) -> list[str]:
    """The calls of a module that write, sync or name something on the disk: those of `os` and of a Path."""
    made = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    calls = [call.func for call in made]
    opens = [call for call in made if ast.unparse(call.func) == "open"]
    return [
        f"{module.relative_to(PROJECT)}:{call.lineno} {ast.unparse(call)}"
        for call in calls
        if isinstance(call, ast.Attribute) and call.attr in LASTING
        if ast.unparse(call.value) not in ("durable", "self", "ingest")
        if call.attr != "replace" or ast.unparse(call.value) == "os"
    ] + [f"{module.name}: open" for call in opens if [ast.unparse(a) for a in call.args[1:]] != ["'rb'"]]


def test_what_must_survive_a_crash_is_written_synced_and_named_in_durable_alone() -> None:
    modules = [
        path
        for layer in ("kernel", "store", "transfer", "upkeep")
        for path in (PROJECT / "cachd" / layer).glob("*.py")
    ]
    found = {path.name: calls for path in modules if (calls := lasting_calls(path))}
    assert len(found.pop("durable.py")) > 10
    assert found == {}
