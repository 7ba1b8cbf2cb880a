"""Builds the sdist and the wheel, and checks both: `make dist`, or `python -m tests.dist [DIRECTORY]`.

The same commit gives the same bytes: all times in the archives are SOURCE_DATE_EPOCH, the time of the
commit unless the environment sets it. The packages that build are those of the environment; none is fetched.
"""

from __future__ import annotations

import email
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cachd import __version__
from tests.ground.needs import LIST_FILES

PROJECT = Path(__file__).parent.parent
NAME = f"cachd-{__version__}"
# What is in the sdist beside the package itself.
BESIDE = {"CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"}
SERVICE = {"systemd/cachd.service", "systemd/config.yaml"}
MADE_BY_THE_BUILD = {"PKG-INFO", ".gitignore"}


@dataclass(frozen=True, slots=True)
class Built:
    """An sdist and a wheel."""

    sdist: Path
    wheel: Path

    def digests(self) -> dict[str, str]:
        """The sha256 of each, by its name."""
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (self.sdist, self.wheel)}


def build(project: Path, into: Path, epoch: int) -> Built:
    """Build both, the wheel from the sdist. Raises CalledProcessError."""
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    words = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), str(project))
    subprocess.run(words, env=env, check=True, capture_output=True, text=True)
    return Built(into / f"{NAME}.tar.gz", into / f"{NAME}-py3-none-any.whl")


def package() -> set[str]:
    """The files of the package that git knows."""
    listed = subprocess.run([*LIST_FILES, "cachd"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def copy(project: Path, into: Path) -> Path:
    """A copy of what the build reads, without git."""
    for name in (*package(), *BESIDE, *SERVICE, "tests/__init__.py", "bench/__init__.py"):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / name, into / name)
    return into


def check(built: Built) -> None:
    """Raises AssertionError for a file too many or too few, and for metadata that say something else."""
    with tarfile.open(built.sdist) as sdist:
        members = {member.name.removeprefix(f"{NAME}/"): member for member in sdist.getmembers()}
    assert members.keys() - MADE_BY_THE_BUILD == package() | BESIDE | SERVICE
    assert {m.mode & 0o022 for m in members.values()} == {0}, "others may write what is unpacked"
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        assert names == package(), "py.typed and the pages are part of the package"
        about = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == (PROJECT / "LICENSE").read_bytes()
        assert b"cachd = cachd.cli:main" in wheel.read(f"{NAME}.dist-info/entry_points.txt")
        assert b"Tag: py3-none-any" in wheel.read(f"{NAME}.dist-info/WHEEL")
    assert (about["Name"], about["Version"], about["License-Expression"]) == (
        "cachd",
        __version__,
        "Apache-2.0",
    )
    assert about["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in about.get_all("Classifier", [])


def twine(built: Built) -> None:
    """What a registry would refuse. Raises CalledProcessError."""
    words = (sys.executable, "-m", "twine", "check", "--strict", str(built.sdist), str(built.wheel))
    subprocess.run(words, check=True)


def main(into: Path) -> None:
    words = ("git", "log", "-1", "--format=%ct")
    of_commit = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or of_commit.stdout)
    shutil.rmtree(into, ignore_errors=True)
    built = build(PROJECT, into, epoch)
    check(built)
    twine(built)
    for name, digest in built.digests().items():
        print(f"{digest}  {into / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
