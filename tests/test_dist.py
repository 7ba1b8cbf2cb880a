"""A release is an sdist and a wheel, which hold what they should and are the same every time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from cachd import __version__
from tests.dist import PROJECT, Built, build, check, copy, twine
from tests.ground.needs import needs

pytestmark = needs("git")
EPOCH = 1_790_000_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("dist")
    return build(copy(PROJECT, place / "project"), place / "out", EPOCH)


def test_sdist_and_wheel_hold_the_package_its_licence_and_no_tests(built: Built) -> None:
    check(built)


def test_no_registry_would_refuse_them(built: Built) -> None:
    twine(built)


def test_the_same_commit_gives_the_same_bytes_wherever_and_whenever_it_is_built(
    built: Built, tmp_path: Path
) -> None:
    project = copy(PROJECT, tmp_path / "another place")
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o777 if path.is_dir() else 0o606)
    assert build(project, tmp_path / "out", EPOCH).digests() == built.digests()
    assert build(project, tmp_path / "later", EPOCH + 86_400).digests() != built.digests()


def test_the_wheel_runs_without_the_checkout(built: Built, tmp_path: Path) -> None:
    """With the packages of this environment, so that no registry is asked."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    words = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index")
    subprocess.run([*words, str(built.wheel)], check=True, capture_output=True)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "beside.pth").write_text("\n".join(here))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [tmp_path / "venv/bin/cachd", "version"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (ended.stdout, ended.returncode) == (f"{__version__}\n", 0)


def test_make_dist_builds_and_checks_both() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    rule = re.search(r"^dist: \$\(READY\).*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert rule
    assert "-m tests.dist" in rule[1]
    assert shutil.which("make") is None or "tests.dist" in dry_run()


def dry_run() -> str:
    words = ("make", "--dry-run", "--old-file=.venv/.ready", "dist")
    return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True).stdout
