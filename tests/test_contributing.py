"""CONTRIBUTING.md and docs/decisions are true: all that they name exists, and their lists match the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults.test_index import named_in
from tests.test_layers import PYPROJECT

PROJECT = Path(__file__).parent.parent
MAKEFILE = (PROJECT / "Makefile").read_text()
CONTRIBUTING = PROJECT / "CONTRIBUTING.md"
DECISIONS = PROJECT / "docs/decisions"
PAGES = [CONTRIBUTING, PROJECT / "CHANGELOG.md", *sorted(DECISIONS.glob("*.md"))]
RECORDS = sorted(DECISIONS.glob("[0-9]*.md"))
SECTIONS = ["Context", "Decision", "Costs", "Evidence", "When to look again"]
FILES = r"(?:py|md|toml|lock|json|yaml)"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(text: str) -> list[str]:
    """The code in a page: its inline spans, and each line of its blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return spans + [line for block in blocks for line in block.splitlines()]


def absent_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    absent = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors_of(target))):
            absent.append(link)
    return absent


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def absent_names(text: str) -> list[str]:
    """Names in the code of a page that the project lacks: files, tests, modules to run, targets of make."""
    absent = []
    for said in code_of(text):
        file, _, test = said.partition("::")
        here = PROJECT / file
        is_path = re.fullmatch(rf"[\w./-]+\.{FILES}", file) and "/" in file
        is_place = re.match(r"(?:cachd|tests|bench|docs|daemonset|lock|\.ci)/[\w./-]*$", file)
        if ((is_path or is_place) and not here.exists()) or (test and test not in named_in(here)):
            absent.append(said)
        for target in re.findall(r"\bmake ([a-z]+)", said):
            absent += [] if re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) else [f"make {target}"]
        for module in re.findall(r"python -m ([\w.]+)", said):
            at = PROJECT / module.replace(".", "/")
            absent += [] if at.with_suffix(".py").is_file() or (at / "__main__.py").is_file() else [module]
    return absent


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert absent_links(page, page.read_text()) == []


@each_page
def test_every_file_test_module_and_target_of_make_that_is_named_is_there(page: Path) -> None:
    assert absent_names(page.read_text()) == []


@pytest.mark.parametrize(
    "said",
    [
        "`cachd/nowhere.py`",
        "`test/test_pull.py`",
        "`cachd/nowhere`",
        "`tests/test_layers.py::test_nothing`",
        "`python -m bench.nothing`",
        "```sh\nmake nothing\n```",
    ],
)
def test_a_name_that_is_not_there_is_found(said: str) -> None:
    assert absent_names(said)
    assert absent_links(CONTRIBUTING, "[a](nowhere.md) [b](README.md#nowhere) [c](SECURITY.md#report)") == [
        "nowhere.md",
        "README.md#nowhere",
    ]


def test_the_layers_are_those_of_the_contract() -> None:
    told = part("layers").strip("`\n").splitlines()
    contracts = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    (contract,) = (c for c in contracts if c["containers"] == ["cachd"])
    assert told == contract["layers"]


def test_the_modules_that_name_schemes_are_those_that_it_lists() -> None:
    """They are found by "s3": beside botocore's name of the service, only they spell out that scheme."""
    found = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "cachd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == "s3"
    }
    assert set(re.findall(r"^- `(\S+)`", part("schemes"), re.MULTILINE)) == found - {"cachd/sources/aws.py"}


def part(name: str) -> str:
    """The text between two marks of CONTRIBUTING.md."""
    return CONTRIBUTING.read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def test_the_hooks_before_a_commit_are_what_make_check_runs_before_the_tests() -> None:
    recipe = re.findall(r"^\t(.+)$", MAKEFILE.split("\ncheck: ")[1].split("\n\n")[0], re.MULTILINE)
    *before, tests = [line.replace("$(BIN)", ".venv/bin") for line in recipe]
    assert tests == ".venv/bin/python -m tests"
    (local,) = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == before
    for hook in local["hooks"]:  # on the whole project, as make runs them
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)


def test_the_list_of_decisions_has_each_with_its_title() -> None:
    listed = re.findall(r"^\| \[(\d+)\]\((\S+)\) \| (.+) \|$", (DECISIONS / "README.md").read_text(), re.M)
    titles = [re.fullmatch(r"# (\d{4}): (.+)", path.read_text().splitlines()[0]) for path in RECORDS]
    assert listed == [
        (told[1], path.name, told[2]) for told, path in zip(titles, RECORDS, strict=True) if told
    ]
    assert [path.name[:4] for path in RECORDS] == [f"{n:04}" for n in range(1, len(RECORDS) + 1)]


@pytest.mark.parametrize("page", RECORDS, ids=lambda page: page.name)
def test_a_decision_is_a_page_of_five_sections_whose_evidence_is_a_test(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert "::test_" in text.split("## Evidence")[1].split("\n## ")[0]
    assert len(text.splitlines()) <= 60


def test_whoever_imports_cachd_gets_its_types() -> None:
    """PEP 561. Every file of the package goes into the wheel."""
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["cachd"]}
    assert "Typing :: Typed" in PYPROJECT["project"]["classifiers"]
    assert (PROJECT / "cachd/py.typed").is_file()


# --- nothing of cachd is mocked or patched ---


CHANGES = ("setattr", "delattr", "setitem", "delitem")


def root_of(node: ast.expr) -> str:
    """The name that an expression such as `a.b.c` begins with; of a text, the text."""
    while isinstance(node, ast.Attribute):
        node = node.value
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def imported(nodes: list[ast.AST]) -> Iterator[tuple[int, str, str]]:
    """Line, full name and name here of everything that is imported."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                yield node.lineno, f"{module}{alias.name}", alias.asname or alias.name.partition(".")[0]


def changed(node: ast.AST) -> list[ast.expr]:
    """What a statement or a call gives another attribute or member."""
    if isinstance(node, ast.Assign):
        return [target.value for target in node.targets if isinstance(target, ast.Attribute)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in CHANGES:
        return node.args[:1]
    return []


def patches(source: str) -> list[int]:
    """The lines that replace something of cachd, or import what does."""
    nodes = list(ast.walk(ast.parse(source)))
    names = list(imported(nodes))
    ours = {name for _, full, name in names if full.partition(".")[0] == "cachd"}
    found = [line for line, full, _ in names if full.startswith("unittest.mock")]
    for node in nodes:
        roots = [root_of(what) for what in changed(node)]
        if isinstance(node, ast.Assign | ast.Call):
            found += [node.lineno for root in roots if root in ours or root.startswith("cachd.")]
    return found


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr("cachd.model.manifest.MAX_FILES", 20)',
        "from cachd.kernel import calls; monkeypatch.setattr(calls, '_CACHESTAT', 1)",
        "from cachd.kernel import calls as these; these._CACHESTAT = 1",
        "import cachd.kernel; setattr(cachd.kernel.threads, 'CORES', 1)",
        "from cachd.store.names import Names; Names.get = None",
        "from cachd.settings import file; monkeypatch.setitem(file.KEYS, 'x', 1)",
        "from unittest import mock",
        "from unittest.mock import patch",
    ],
)
def test_a_test_that_patches_cachd_is_found(line: str) -> None:
    assert patches(line)
    assert not patches("import os; os.umask = None; from cachd.model import Ref; ref = Ref.parse('x')")


def test_no_test_patches_cachd() -> None:
    files = sorted((PROJECT / "tests").rglob("*.py"))
    found = {path.relative_to(PROJECT): patches(path.read_text()) for path in files}
    assert {str(path): lines for path, lines in found.items() if lines} == {}
