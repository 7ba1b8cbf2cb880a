"""The bill of materials of the image as CycloneDX 1.6: every package of its lock file, and who needs it.

The same lock gives the same text. The packages of the base image are not in it; the base is, by its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachd import __version__

PROJECT = Path(__file__).parent.parent
SBOM = PROJECT / "lock/sbom.cdx.json"
DOCKERFILE = PROJECT / "Dockerfile"
_PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.+?))? \\$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of a lock file: where it is wanted (a marker), its files, and the packages that want it."""

    name: str
    version: str
    marker: str
    hashes: frozenset[str]
    wanted_by: frozenset[str]

    @property
    def purl(self) -> str:
        """The package URL."""
        return f"pkg:pypi/{self.name}@{self.version}"


def pins(lock: str) -> list[Pin]:
    """What a lock file names."""
    found, starts = [], list(_PIN.finditer(lock))
    for pin, following in zip(starts, [*starts[1:], None], strict=True):
        block = lock[pin.end() : following.start() if following else len(lock)]
        hashes = frozenset(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block))
        via = re.search(r"# via (.+)", block)
        found.append(Pin(pin[1], pin[2], pin[3] or "", hashes, frozenset(via[1].split(", ") if via else ())))
    return found


def name_of(requirement: str) -> str:
    """The package that a requirement names, as the Python packaging guide normalises it."""
    found = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def rendered(lock: str, requirements: Iterable[str]) -> str:
    """The document for a lock file and for what cachd itself requires."""
    locked, base = pins(lock), base_of(DOCKERFILE.read_text())
    root = f"pkg:pypi/cachd@{__version__}"
    purls = {pin.name: pin.purl for pin in locked}
    needs: dict[str, set[str]] = {root: {purls[name_of(each)] for each in requirements}}
    needs |= {pin.purl: set() for pin in locked}
    for pin in locked:
        for name in pin.wanted_by:
            needs[purls[name]].add(pin.purl)
    digest = hashlib.sha256(lock.encode()).hexdigest()
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest + str(base['purl']))}",
        "version": 1,
        "metadata": {
            "component": _application(root),
            "properties": [{"name": "cachd:lock:sha256", "value": digest}],
        },
        "components": [base, *(_library(pin) for pin in locked)],
        "dependencies": [{"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(needs.items())],
    }
    return json.dumps(document, indent=1) + "\n"


def base_of(dockerfile: str) -> dict[str, Any]:
    """The base image as a component."""
    found = re.search(r"^ARG BASE=(\S+)/(\S+):(\S+)@(sha256:[0-9a-f]{64})$", dockerfile, re.MULTILINE)
    if found is None:
        raise ValueError("Dockerfile: ARG BASE names no image by its digest")
    registry, name, tag, digest = found.groups()
    short = name.rpartition("/")[2]
    purl = f"pkg:oci/{short}@{digest.replace(':', '%3A')}?repository_url={registry}/{name}&tag={tag}"
    hashes = [{"alg": "SHA-256", "content": digest.partition(":")[2]}]
    return {
        "type": "container",
        "bom-ref": purl,
        "name": f"{registry}/{name}",
        "version": tag,
        "purl": purl,
        "hashes": hashes,
    }


def _application(purl: str) -> dict[str, Any]:
    licenses = [{"license": {"id": "Apache-2.0"}}]
    return {
        "type": "application",
        "bom-ref": purl,
        "name": "cachd",
        "version": __version__,
        "purl": purl,
        "licenses": licenses,
    }


def _library(pin: Pin) -> dict[str, Any]:
    where = {"properties": [{"name": "cachd:marker", "value": pin.marker}]} if pin.marker else {}
    told = {"type": "library", "bom-ref": pin.purl, "name": pin.name, "version": pin.version}
    return {**told, "purl": pin.purl, **where}
