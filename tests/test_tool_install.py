"""cachd installs as a tool of one user, by the README's lines, with the Python of the distribution.

In a home directory of the test's own. The packages come from the registry that pip of this environment asks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from cachd import __version__
from tests.dist import PROJECT, copy
from tests.ground.needs import SYSTEM_PYTHON, needs, refuse, require
from tests.test_notices import Listener

README = (PROJECT / "README.md").read_text()
LINES = {"pipx": "pipx install .", "uv": "uv tool install ."}
START = ("install -d -m 0755 ~/cachd", "~/.local/bin/cachd serve --root ~/cachd")
INSTALL_SECONDS = 500
# What pip and uv say when no registry can be asked.
UNREACHABLE = re.compile(
    r"(?i)from versions: none|Could not fetch|connection (?:error|broken|refused)"
    r"|Failed to (?:fetch|establish)|dns error|name resolution|error sending request|Max retries"
)


def registry() -> dict[str, str]:
    """The environment in which pip and uv ask the registry that pip asks here."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    found = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
    if index:
        found |= {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index}
    if "PIP_CERT" in found:
        found["SSL_CERT_FILE"] = found["PIP_CERT"]
    return found


def tool(name: str) -> str:
    """The directory of a program that installs tools."""
    beside = Path(sys.executable).with_name(name)
    return f"{beside.parent}:" if name == "uv" and beside.exists() else ""


@pytest.mark.parametrize("by", LINES)
@needs("git", "distribution's Python")
def test_a_line_of_the_readme_installs_cachd_as_a_tool_that_serves(by: str, tmp_path: Path) -> None:
    require(*(["pipx"] if by == "pipx" else []))
    assert all(line in README.splitlines() for line in (LINES[by], *START))
    home = tmp_path / "home"
    home.mkdir()
    env = {
        **registry(),
        "HOME": str(home),
        "PATH": f"{tool(by)}/usr/local/bin:/usr/bin:/bin",
        "PIPX_DEFAULT_PYTHON": SYSTEM_PYTHON,
        "UV_PYTHON": SYSTEM_PYTHON,
        "UV_PYTHON_PREFERENCE": "only-system",
    }
    installed = subprocess.run(
        LINES[by].split(),
        cwd=copy(PROJECT, tmp_path / "checkout"),
        env=env,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    said = f"{installed.stdout}\n{installed.stderr}"
    if installed.returncode and (found := UNREACHABLE.search(said)):
        refuse("registry", found[0])
    assert installed.returncode == 0, said[-3000:]
    cachd = home / ".local/bin/cachd"
    version = subprocess.run([cachd, "version"], env=env, capture_output=True, text=True)
    assert version.stdout == f"{__version__}\n", version.stderr
    made_of = (cachd.resolve().parent.parent / "pyvenv.cfg").read_text()
    assert f"home = {Path(SYSTEM_PYTHON).parent}\n" in made_of
    assert_serves(cachd, tmp_path, env)


def assert_serves(cachd: Path, place: Path, env: Mapping[str, str]) -> None:
    """The daemon, started as the README says, answers the installed command line."""
    url, systemd = f"unix:{place}/sock", Listener(str(place / "notify"))
    env = {**env, "CACHD_RESERVE_FREE": "0", "NOTIFY_SOCKET": systemd.address}
    words = ["bash", "-c", f"{START[0]} && exec {START[1]} --listen {url}"]
    with closing(systemd), subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL) as daemon:
        systemd.hears("READY")
        listed = subprocess.run([cachd, "ls", "--url", url], env=env, capture_output=True, text=True)
        daemon.terminate()
        assert daemon.wait(60) == 0
    assert listed.returncode == 0, listed.stderr
