"""Reads the catalog from disk at start: ready names, quarantined names, recorded manifests.

No file is hashed for it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from cachd import __version__
from cachd.errors import DiskFailed, Leased
from cachd.files import UNREADABLE
from cachd.kernel import durable
from cachd.model import STRENGTHS, UNVERIFIED, Digest, LeftOut, Manifest, ModelSpec, Snapshot
from cachd.model.finding import findings_of
from cachd.model.triton import place_of
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A snapshot that was ready until damage was found.

    `since`: seconds since the epoch. `reason`: what was wrong, for people. `inodes`: the inode of each blob
    with wrong bytes, which distinguishes it from the blob that replaces it.
    """

    snapshot: Snapshot
    since: float
    reason: str
    inodes: Mapping[Digest, int]

    def as_document(self) -> dict[str, object]:
        """The ready document of the snapshot, with a `damage` member."""
        inodes = {str(blob): inode for blob, inode in self.inodes.items()}
        damage = {"since": self.since, "reason": self.reason, "inodes": inodes}
        return ready_document(self.snapshot) | {"damage": damage}


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def ready_document(snapshot: Snapshot) -> dict[str, object]:
    """The JSON document of a published snapshot, for ready files and the API."""
    return {
        **snapshot.spec.as_document(),
        "revision": snapshot.revision,
        "manifest": snapshot.manifest,
        "bytes": snapshot.size,
        "files": snapshot.files,
        "verified": snapshot.verified,
        "verified_by": dict(snapshot.verified_by),
        "left_out": snapshot.left_out.as_document() if snapshot.left_out else None,
        "warnings": list(snapshot.warnings),
        "preflight": [each.as_document() for each in snapshot.findings],
        "advice": snapshot.advice,
        "published_at": iso(snapshot.published_at),
        "path": f"models/{snapshot.name}",
        "file": f"models/{snapshot.name}/{snapshot.file}" if snapshot.file else None,
        "immutable_path": f"models/{snapshot.address}",
        "hub": {
            "repo": snapshot.repo,
            "commit": snapshot.commit,
            "revision": snapshot.hub_revision,
            "refs": snapshot.hub_refs,
            **({"renamed_to": snapshot.renamed_to} if snapshot.renamed_to else {}),
        },
        "cachd": __version__,
    }


def ready_snapshot(layout: Layout, name: str) -> Snapshot | None:
    """The snapshot that a name leads to, if its files are as its ready file says. Changes nothing.

    For a process that does not hold the root.
    """
    try:
        return _intact(layout, layout.ready_file(name))
    except UNREADABLE:
        return None


def read_snapshots(layout: Layout) -> dict[str, Snapshot]:
    """The ready snapshots by name: those whose link, tree and manifest are as their ready file says.

    Removes every other ready file, before the daemon does anything else.
    """
    found = {}
    for path in sorted(layout.ready.glob("[!.]*.json")):
        try:
            snapshot = _intact(layout, path)
            found[snapshot.name] = snapshot
        except UNREADABLE as error:
            check_passing(error, path)
            log.warning("readiness withdrawn", file=path.name, reason=repr(error))
            path.unlink(missing_ok=True)
    return found


def _intact(root: Layout, ready: Path) -> Snapshot:
    """The snapshot of a ready file. Raises one of UNREADABLE if link, tree or manifest are not as it says."""
    snapshot = _read_ready(ready)
    models, manifests = str(root.models), str(root.manifests)  # as text: faster for thousands of names
    if os.readlink(f"{models}/{snapshot.name}") != f".trees/{snapshot.manifest}":
        raise ValueError("models/NAME is not a link to its snapshot")
    document = durable.read_document(f"{manifests}/{snapshot.manifest}.json")
    listed, layout = document["files"], document.get("layout")
    if not snapshot.verified_by:  # ready files of older versions have none
        snapshot = replace(snapshot, verified_by=_verified_by(listed))
    sizes = {place_of(file["path"], layout): file["size"] for file in listed}
    _check_sizes(f"{models}/.trees/{snapshot.manifest}", sizes)
    if snapshot.file and snapshot.file not in sizes:
        raise ValueError(f"{snapshot.file:.120} is not in its manifest")
    return snapshot


def _verified_by(files: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, int], ...]:
    """`Manifest.verified_by`, from the files of a manifest's document."""
    counts = Counter(
        str(file["digest"]).partition(":")[0] if file["digest"] else UNVERIFIED for file in files
    )
    return tuple((each, counts[each]) for each in (UNVERIFIED, *STRENGTHS) if each in counts)


def _check_sizes(tree: str, sizes: Mapping[str, int]) -> None:
    """Raises one of UNREADABLE if a file, given by its place in the tree, is missing or has another size.

    So a disk that lost bytes after it reported a successful sync is noticed.
    """
    if not sizes:
        raise ValueError("its manifest lists no files")
    for path, expected in sizes.items():
        if (size := os.lstat(f"{tree}/{path}").st_size) != expected:
            raise ValueError(f"{path} has {size} of {expected} bytes")


def read_quarantined(layout: Layout, named: Mapping[str, Snapshot]) -> dict[str, Quarantine]:
    """The quarantines by name. Removes unreadable ones, and those of names that were published since."""
    found = {}
    for path in sorted(layout.quarantined.glob("[!.]*.json")):
        try:
            snapshot, damage = _read_ready(path), durable.read_document(path)["damage"]
            ready = named.get(snapshot.name)
            if ready is None or ready.published_at == snapshot.published_at:
                read_manifest(layout, snapshot.manifest)
                found[snapshot.name] = Quarantine(
                    snapshot,
                    since=float(damage["since"]),
                    reason=str(damage["reason"]),
                    inodes={Digest.parse(blob): int(inode) for blob, inode in damage["inodes"].items()},
                )
                continue
            reason = "the name was published again"
        except UNREADABLE as error:
            check_passing(error, path)
            reason = repr(error)
        log.info("quarantine removed", file=path.name, reason=reason)
        path.unlink(missing_ok=True)
    return found


def read_manifest(layout: Layout, manifest: str) -> Manifest:
    """A recorded manifest. Raises FileNotFoundError if it is gone, DiskFailed or Leased if unreadable."""
    path = layout.manifest(manifest)
    try:
        return Manifest.from_document(durable.read_document(path))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        check_passing(error, path)
        raise DiskFailed(f"{path} is not a manifest: {error!r:.120}", code="manifest_unreadable") from error


def read_shown(manifest: Path) -> list[str]:
    """The folders of the Hub view that ever showed a manifest; none if its file is missing or unreadable."""
    try:
        return [str(folder) for folder in durable.read_document(manifest)["shown"]]
    except UNREADABLE as error:
        check_passing(error, manifest)
        return []


def check_passing(error: Exception, path: Path) -> None:
    """Raises Leased or Unavailable if the error is temporary: the file may be intact, and must be kept."""
    if isinstance(error, Leased):
        raise error
    if isinstance(error, OSError) and error.errno in durable.SCARCE:
        raise durable.too_many_files(path) from error


def is_ready_file_of(path: Path, snapshot: Snapshot) -> bool:
    """Whether a ready file has the content that it should have for a snapshot."""
    try:
        return _read_ready(path) == snapshot_from(ready_document(snapshot))
    except UNREADABLE as error:
        check_passing(error, path)
        return False


def snapshot_from(document: Mapping[str, Any]) -> Snapshot:
    """Read what `ready_document` wrote. Raises one of UNREADABLE on anything else."""
    spec, file = ModelSpec.from_document(document), document.get("file")  # older versions wrote no `file`
    return Snapshot(
        spec=spec,
        manifest=str(document["manifest"]),
        revision=str(document["revision"]),
        size=int(document["bytes"]),
        files=int(document["files"]),
        verified=bool(document["verified"]),
        verified_by=tuple((str(by), int(files)) for by, files in document.get("verified_by", {}).items()),
        left_out=LeftOut.from_document(document.get("left_out")),
        warnings=tuple(str(warning) for warning in document.get("warnings", ())),
        findings=findings_of(document),
        advice=str(document["advice"]) if document.get("advice") else None,
        renamed_to=str(renamed) if (renamed := document["hub"].get("renamed_to")) else None,
        published_at=datetime.fromisoformat(document["published_at"]).timestamp(),
        is_main="main" in document["hub"].get("refs", ()),
        repo=str(document["hub"]["repo"]),
        commit=str(document["hub"]["commit"]),
        file=file.removeprefix(f"models/{spec.name}/") if file else None,
        address=str(document.get("immutable_path", "")).removeprefix("models/"),
    )


def _read_ready(path: Path) -> Snapshot:
    found = snapshot_from(durable.read_document(path))
    if path.stem != found.name:
        raise ValueError(f"{path.name} is about {found.name}")
    return found
