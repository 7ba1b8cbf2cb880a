"""The disk read back at start: which names are ready, which pulls were running. Nothing is hashed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from cachd import __version__
from cachd.errors import DiskFailed, Leased
from cachd.files import UNREADABLE
from cachd.model import STRENGTHS, UNVERIFIED, Digest, Manifest, ModelSpec, Snapshot
from cachd.store import durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A snapshot that was ready until damage was found: since when (epoch), and what was wrong.

    `inodes`: the blobs with wrong bytes, each by its inode, so that the one which takes its place is not
    mistaken for it.
    """

    snapshot: Snapshot
    since: float
    reason: str
    inodes: Mapping[Digest, int]

    def as_document(self) -> dict[str, object]:
        """The ready document of the snapshot, with what was wrong."""
        inodes = {str(blob): inode for blob, inode in self.inodes.items()}
        damage = {"since": self.since, "reason": self.reason, "inodes": inodes}
        return ready_document(self.snapshot) | {"damage": damage}


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def ready_document(snapshot: Snapshot) -> dict[str, object]:
    """What a ready file and the API say of a published snapshot."""
    return {
        **snapshot.spec.as_document(),
        "revision": snapshot.revision,
        "manifest": snapshot.manifest,
        "bytes": snapshot.size,
        "files": snapshot.files,
        "verified": snapshot.verified,
        "verified_by": dict(snapshot.verified_by),
        "published_at": iso(snapshot.published_at),
        "path": f"models/{snapshot.name}",
        "file": f"models/{snapshot.name}/{snapshot.file}" if snapshot.file else None,
        "immutable_path": f"models/{snapshot.address}",
        "hub": {"repo": snapshot.repo, "commit": snapshot.commit, "revision": snapshot.hub_revision},
        "cachd": __version__,
    }


def read_snapshots(layout: Layout) -> dict[str, Snapshot]:
    """Every name whose ready file tells the truth: its link, tree and manifest are what it says.

    A ready file that does not is removed: readiness is withdrawn before anything else is done.
    """
    found = {}
    models, manifests = str(layout.models), str(layout.manifests)  # text: there may be thousands of names
    for path in sorted(layout.ready.glob("[!.]*.json")):
        try:
            snapshot = _read_ready(path)
            if os.readlink(f"{models}/{snapshot.name}") == f".trees/{snapshot.manifest}":
                listed = durable.read_document(f"{manifests}/{snapshot.manifest}.json")["files"]
                if not snapshot.verified_by:  # ready files of before have none
                    snapshot = replace(snapshot, verified_by=_verified_by(listed))
                _check_sizes(f"{models}/.trees/{snapshot.manifest}", listed)
                if snapshot.file and snapshot.file not in {file["path"] for file in listed}:
                    raise ValueError(f"{snapshot.file:.120} is no file of its manifest")
                found[snapshot.name] = snapshot
                continue
            reason = "its link or its tree is another"
        except UNREADABLE as error:
            check_passing(error, path)
            reason = repr(error)
        log.warning("readiness withdrawn", file=path.name, reason=reason)
        path.unlink(missing_ok=True)
    return found


def _verified_by(files: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, int], ...]:
    """As `Manifest.verified_by`, of a manifest's document."""
    counts = Counter(
        str(file["digest"]).partition(":")[0] if file["digest"] else UNVERIFIED for file in files
    )
    return tuple((each, counts[each]) for each in (UNVERIFIED, *STRENGTHS) if each in counts)


def _check_sizes(tree: str, files: list[dict[str, Any]]) -> None:
    """Raises what is `UNREADABLE` when a file is gone, or shorter than it was: a disk that lost the bytes it
    had called durable shows it so."""
    if not files:
        raise ValueError("its manifest lists nothing")
    for file in files:
        if (size := os.lstat(f"{tree}/{file['path']}").st_size) != file["size"]:
            raise ValueError(f"{file['path']} has {size} of {file['size']} bytes")


def read_quarantined(layout: Layout, named: Mapping[str, Snapshot]) -> dict[str, Quarantine]:
    """Every name whose repair is not done. One that was published since is forgotten."""
    found = {}
    for path in sorted(layout.quarantined.glob("[!.]*.json")):
        try:
            snapshot, told = _read_ready(path), durable.read_document(path)["damage"]
            ready = named.get(snapshot.name)
            if ready is None or ready.published_at == snapshot.published_at:
                read_manifest(layout, snapshot.manifest)
                found[snapshot.name] = Quarantine(
                    snapshot,
                    since=float(told["since"]),
                    reason=str(told["reason"]),
                    inodes={Digest.parse(blob): int(inode) for blob, inode in told["inodes"].items()},
                )
                continue
            reason = "published since"
        except UNREADABLE as error:
            check_passing(error, path)
            reason = repr(error)
        log.info("quarantine forgotten", file=path.name, reason=reason)
        path.unlink(missing_ok=True)
    return found


def read_manifest(layout: Layout, manifest: str) -> Manifest:
    """The files of a snapshot. Raises FileNotFoundError when it is gone, DiskFailed when it is none."""
    path = layout.manifest(manifest)
    try:
        return Manifest.from_document(durable.read_document(path))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        check_passing(error, path)
        raise DiskFailed(f"{path} is no manifest: {error!r:.120}", code="manifest_unreadable") from error


def read_shown(manifest: Path) -> list[str]:
    """The folders of the Hub view that ever showed a recorded manifest; none when it is not recorded."""
    try:
        return [str(folder) for folder in durable.read_document(manifest)["shown"]]
    except UNREADABLE as error:
        check_passing(error, manifest)
        return []


@dataclass(frozen=True, slots=True)
class Remembered:
    """A pull to go on with: its spec, what it is permitted (see Permit), and how many lives of the daemon in
    a row began it and died."""

    spec: ModelSpec
    replace: bool
    pins: bool
    began: int


def read_began(path: Path) -> int:
    """How many lives of the daemon began a pull; 0 when that is not known."""
    try:
        return max(int(durable.read_file(path, at_most=20)), 0)
    except (OSError, ValueError, Leased):
        return 0


def read_pending(layout: Layout) -> Iterator[Remembered]:
    """The pulls that were running when the daemon ended."""
    for path in sorted(layout.pending.glob("[!.]*.json")):
        try:
            told = durable.read_document(path)
            spec = ModelSpec.from_document(told)
            yield Remembered(
                spec,
                replace=bool(told.get("replace", True)),  # one of before was allowed to
                pins=bool(told.get("pins", False)),
                began=read_began(layout.began(spec.name)),
            )
        except UNREADABLE as error:
            check_passing(error, path)
            log.warning("unreadable spec forgotten", file=path.name, reason=repr(error))
            path.unlink(missing_ok=True)


def check_passing(error: Exception, path: Path) -> None:
    """Raises Unavailable when it is not the file that is wrong: what cannot be opened now is not given up."""
    if isinstance(error, Leased):
        raise error
    if isinstance(error, OSError) and error.errno in durable.SCARCE:
        raise durable.too_many_files(path) from error


def tells(path: Path, snapshot: Snapshot) -> bool:
    """Whether a ready file says what it should of a snapshot."""
    try:
        return _read_ready(path) == snapshot_from(ready_document(snapshot))
    except UNREADABLE as error:
        check_passing(error, path)
        return False


def snapshot_from(told: Mapping[str, Any]) -> Snapshot:
    """Read what `ready_document` wrote. Raises one of UNREADABLE on anything else."""
    spec, file = ModelSpec.from_document(told), told.get("file")  # files of before have none
    return Snapshot(
        spec=spec,
        manifest=str(told["manifest"]),
        revision=str(told["revision"]),
        size=int(told["bytes"]),
        files=int(told["files"]),
        verified=bool(told["verified"]),
        verified_by=tuple((str(by), int(files)) for by, files in told.get("verified_by", {}).items()),
        published_at=datetime.fromisoformat(told["published_at"]).timestamp(),
        repo=str(told["hub"]["repo"]),
        commit=str(told["hub"]["commit"]),
        file=file.removeprefix(f"models/{spec.name}/") if file else None,
        address=str(told.get("immutable_path", "")).removeprefix("models/"),
    )


def _read_ready(path: Path) -> Snapshot:
    found = snapshot_from(durable.read_document(path))
    if path.stem != found.name:
        raise ValueError(f"{path.name} speaks of {found.name}")
    return found
