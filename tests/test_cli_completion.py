"""Shells complete commands and the names of models, each with its own script."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ground.needs import needs
from tests.ground.site import PATIENCE_SECONDS, Ground

PROGRAM = Path(sys.executable).with_name("cachd")
pytestmark = pytest.mark.skipif(
    not PROGRAM.exists(), reason="cachd is not installed as a program beside this Python"
)


def completed(ground: Ground, command: list[str], **env: str) -> str:
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        command,
        env={**os.environ, "PATH": path, "CACHD_URL": ground.node.url, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    return ended.stdout


def script(ground: Ground, shell: str) -> str:
    """What `--show-completion` prints in that shell."""
    return completed(ground, [str(PROGRAM)], _CACHD_COMPLETE=f"source_{shell}")


@needs("bash")
def test_bash_completes_names_of_models(ground: Ground) -> None:
    ground.have("bash-one.bin")
    ground.have("bash-two.bin")
    shown = script(ground, "bash")

    def reply(*words: str) -> list[str]:
        listed = " ".join(map(shlex.quote, words))
        tried = f"""{shown}
            COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}
            _cachd_completion cachd; printf '%s\\n' "${{COMPREPLY[@]}}" """
        return completed(ground, ["bash", "--norc", "-c", tried]).split()

    assert reply("cachd", "show", "bash-") == ["bash-one.bin", "bash-two.bin"]
    assert reply("cachd", "rm", "bash-one.bin", "bash-") == ["bash-two.bin"], "one is there already"
    assert reply("cachd", "show", "--server", "http://127.0.0.1:1", "bash-") == []


@needs("zsh")
def test_zsh_completes_names_of_models(ground: Ground) -> None:
    ground.have("zsh-one.bin")
    tried = f"""compdef() {{ :; }}; _arguments() {{ print -r -- "$@"; }}
        {script(ground, "zsh")}
        words=(cachd show zsh-); CURRENT=3; _cachd_completion"""
    assert "zsh-one.bin" in completed(ground, ["zsh", "-f", "-c", tried])


@needs("fish")
def test_fish_completes_names_of_models(ground: Ground) -> None:
    ground.have("fish-one.bin")
    tried = f"{script(ground, 'fish')}\ncomplete -C 'cachd show fish-'"
    assert completed(ground, ["fish", "--no-config", "-c", tried]).split() == ["fish-one.bin"]
