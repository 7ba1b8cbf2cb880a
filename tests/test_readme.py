"""The pages are true: their commands run, their tables are the code's, their promises are tests."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cachd import __version__
from cachd.cli.exits import EXIT_CODES
from cachd.config import Config, Model
from cachd.settings.tokens import TokenFile
from docs import render
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.needs import LIST_FILES, needs, require
from tests.ground.node import Node
from tests.test_contributing import absent_links

PROJECT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text() for page in (render.README, *sorted(render.DOCS.glob("*.md")))}
README = PAGES["README.md"]
OF_A_CLUSTER = ("kubernetes.md", "runbook.md")  # tests/test_cluster_pages.py checks what these tell to run
MAKEFILE = (PROJECT / "Makefile").read_text()
REPO = "Qwen/Qwen2.5-0.5B-Instruct"
MODEL = {"config.json": b"{}", "model.safetensors": noise(6 << 20), "pytorch_model.bin": noise(1 << 20, 2)}

CONTAINER = (
    "docker run -d --name cachd --restart unless-stopped --stop-timeout 30 --network host"
    " -v /var/lib/cachd:/var/lib/cachd cachd:0.1.0"
)
# Each installs something on the machine: tests/test_install.py runs them in another place.
INSTALLING = [
    "python3 -m venv /opt/cachd",
    "/opt/cachd/bin/python -m pip install .",
    "useradd --system --no-create-home --shell /usr/sbin/nologin cachd",
    "install -D -m 0644 systemd/config.yaml /etc/cachd/config.yaml",
    "install -D -m 0644 systemd/cachd.service /etc/systemd/system/cachd.service",
    "systemctl enable --now cachd",
    "install -d -o 65532 -g 65532 -m 0755 /var/lib/cachd",
    CONTAINER,
]
AS_A_TOOL = [
    "pipx install .",
    "uv tool install .",
    "install -d -m 0755 ~/cachd",
    "~/.local/bin/cachd serve --root ~/cachd",
]
SECRET = 'kubectl -n cachd create secret generic cachd --from-literal=token="$(openssl rand -hex 32)"'
# Commands that another part of the checks runs; each names it.
RUN_ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "docker build -t cachd:0.1.0 .": "Dockerfile",
    "kubectl apply -k daemonset": "tests/test_daemonset.py",
    SECRET: "daemonset/README.md",
    **dict.fromkeys(INSTALLING, "tests/test_install.py"),
    **dict.fromkeys(AS_A_TOOL, "tests/test_tool_install.py"),
    "cachd --ca-file ca.crt ls --url https://cachd.cachd:8470": "tests/attacks/test_listeners.py",
    "cachd ls --url unix:/run/cachd/cachd.sock": "tests/attacks/test_listeners.py",
}


def commands() -> list[str]:
    """Every command of a block, on any page, and those that the README's troubleshooting says to run."""
    blocks = [
        block
        for name, page in PAGES.items()
        if name not in OF_A_CLUSTER
        for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    ]
    found = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys([*found, *troubleshooting()]))


def troubleshooting() -> list[str]:
    rows = README.split("| Symptom | Run |")[1].split("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[1].strip("`") for row in rows]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Node]]:
    with Hub() as hub:
        hub.add(REPO, MODEL)
        place = tmp_path_factory.mktemp("readme")
        with Node(place / "node", {"hf_endpoint": hub.url, "allow": ["127.0.0.0/8"]}) as node:
            yield hub, node


def test_the_commands_of_the_pages_run(served: tuple[Hub, Node], tmp_path: Path) -> None:
    """They follow each other, against one daemon."""
    hub, node = served
    for number, command in enumerate(c for c in commands() if c not in RUN_ELSEWHERE):
        if not command.startswith("curl ") or shutil.which("curl"):
            assert_runs(command, hub, node, tmp_path / str(number))
    require("curl")


def assert_runs(command: str, hub: Hub, node: Node, root: Path) -> None:
    """A command runs as it stands, but for the address of the daemon and the place of the root."""
    if "ready?wait" in command or " qwen" in command:
        wanted: tuple[dict[str, Any], ...] = ({"exclude": ["*.bin"], "name": "qwen"}, {})
        for asked in wanted:
            node.pull(f"hf://{REPO}", **asked)
            node.ready(asked.get("name", REPO.replace("/", "--")))
    if "rollback" in command:
        node.cli("pull", f"hf://{REPO}", "--name", "qwen", "--exclude", "*.json", "--replace", "--wait")
    if "--root" in command:
        root.mkdir(mode=0o755)
    here = command.replace("http://127.0.0.1:8470", node.url).replace("/var/lib/cachd", str(root))
    env = {
        **os.environ,
        "CACHD_RESERVE_FREE": "0",  # the disk of a test may be fuller than a node's
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CACHD_SERVER": node.url,
        "CACHD_HF_ENDPOINT": hub.url,
        "CACHD_ALLOW": '["127.0.0.0/8"]',
    }
    ended = subprocess.run(["bash", "-c", here], env=env, capture_output=True, text=True, timeout=300)
    expected = 1 if command.startswith("cachd preflight") else 0  # the weights of that model are noise
    assert ended.returncode == expected, (command, ended.stderr)
    assert "error_class" not in ended.stdout, command
    if " pull " in command or " wait " in command:
        assert Path(ended.stdout.splitlines()[-1]).name.startswith(("qwen", "Qwen"))


@pytest.mark.parametrize(("command", "place"), RUN_ELSEWHERE.items())
def test_the_other_commands_are_run_where_it_is_said(command: str, place: str) -> None:
    assert command in commands()
    text = (PROJECT / place).read_text()
    words = command.removesuffix(" .").split()
    assert words[0] in text or "cachd" in text
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.MULTILINE)
        # `make check` runs every test too
        assert f"make {words[1]}" in text or (words[1] == "test" and "make check" in text)


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_what_a_page_takes_from_code_and_from_results_is_as_it_is_now(page: Path) -> None:
    assert render.rendered(page.read_text()) == page.read_text(), "run: make docs"


def test_the_plot_is_of_the_results_that_are_kept() -> None:
    assert render.plot() == render.PLOT.read_text(), "run: make docs"


def test_every_rendered_part_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in render.PAGES)
    assert [name for name in render.PARTS if text.count(f"<!-- {name} -->") != 1] == []


def test_each_command_of_the_troubleshooting_is_one_that_is_run() -> None:
    assert len(troubleshooting()) >= 10
    assert all(command.startswith("cachd ") for command in troubleshooting())


def test_every_promise_is_quoted_by_the_tests_that_prove_it() -> None:
    rows = [line for line in PAGES["promises.md"].splitlines() if line.startswith("| ") and "test_" in line]
    assert len(rows) >= 8
    for row in rows:
        promise = row.split("|")[1].strip()
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert len(named) == row.count(".py"), row
        for module, test in named:
            assert f"Promised: {promise}" in " ".join(said_by(PROJECT / "tests" / module, test).split()), test


def said_by(module: Path, test: str) -> str:
    """The docstring of a test."""
    functions = (n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.FunctionDef))
    return next(ast.get_docstring(f) or "" for f in functions if f.name == test)


def test_the_exit_codes_are_all_listed() -> None:
    table = PAGES["exit-codes.md"].split("| Exit code |")[1].split("\n\n")[0]
    assert set(map(int, re.findall(r"^\| (\d+) \| [a-z]", table, re.MULTILINE))) == set(EXIT_CODES)


def test_every_call_of_the_api_is_listed_and_no_other(served: tuple[Hub, Node]) -> None:
    _, node = served
    routes = node.ask("GET", "/openapi.json").document["paths"]
    table = PAGES["api.md"].split("| Call | Does |")[1].split("\n\n")[0]
    told = {path.split("?")[0] for path in re.findall(r"^\| `[A-Z]+ (/[^`\s]*)`", table, re.MULTILINE)}
    assert told == set(routes)


def test_the_yaml_of_the_pages_is_yaml_and_its_models_are_models(tmp_path: Path) -> None:
    blocks = [
        yaml.safe_load(text)
        for name, page in PAGES.items()
        if name not in OF_A_CLUSTER
        for text in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    ]
    (pod,) = (each for each in blocks if "containers" in each)
    (tokens,) = (each for each in blocks if "tokens" in each)
    options = [each for each in blocks if each not in (pod, tokens)]
    (tmp_path / "tokens").write_text(yaml.safe_dump(tokens))
    assert TokenFile(tmp_path / "tokens").are_in_force()
    assert all(mount["readOnly"] for c in pod["containers"] for mount in c["volumeMounts"])
    assert {c["image"] for c in pod["initContainers"]} == {f"cachd:{__version__}"}
    listed = [entry for each in options for entry in each.get("models", ())]
    assert [Model.model_validate(entry).spec.name for entry in listed] == ["qwen", "qwen"]
    assert {key for each in options for key in each} <= set(Config.model_fields)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    at = PROJECT if page == "README.md" else render.DOCS
    assert absent_links(at / page, PAGES[page]) == []


@pytest.mark.parametrize("picture", [PROJECT / "docs/cachd.svg", render.PLOT], ids=lambda p: p.name)
def test_a_picture_is_small_and_readable_in_dark_mode(picture: Path) -> None:
    ElementTree.fromstring(picture.read_text())
    assert "prefers-color-scheme:dark" in picture.read_text()
    assert picture.stat().st_size < 6000


@needs("git")
def test_nothing_in_the_project_needs_what_lies_outside_it() -> None:
    listed = subprocess.run(LIST_FILES, cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = PROJECT / name
        if path.is_file() and path.suffix not in (".svg", ".png") and path != Path(__file__):
            assert not re.search(r"\.\./shared|/work/|/root/\w", path.read_text(errors="replace")), name
