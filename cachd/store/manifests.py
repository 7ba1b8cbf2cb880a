"""Keeps the recorded manifests: the list of files of every snapshot on the disk, named or not.

A recorded manifest that no name uses belongs to a snapshot that a newer one replaced, to one that is kept for
a rollback, or to a withdrawal that a crash interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace

import structlog

from cachd.errors import DiskFailed, Leased, NotFound
from cachd.kernel import durable
from cachd.model import Digest, File, Manifest, Snapshot
from cachd.store import catalog
from cachd.store.content import ContentStore
from cachd.store.layout import Layout
from cachd.store.names import Names

log = structlog.get_logger(__name__)


class Manifests:
    """The recorded manifests of one root. Safe from any thread."""

    def __init__(self, layout: Layout, content: ContentStore, names: Names) -> None:
        self._layout, self._content, self._names = layout, content, names
        self._bases: dict[str, str] = {}  # by manifest, for the manifests read so far

    def of(self, snapshot: Snapshot) -> Manifest:
        """The files of a published snapshot.

        Raises NotFound if the snapshot was withdrawn meanwhile, DiskFailed if its manifest is unreadable.
        """
        try:
            return self.read(snapshot.manifest)
        except FileNotFoundError as error:
            raise NotFound(f"{snapshot.name} was withdrawn and is no longer here") from error

    def read(self, manifest: str) -> Manifest:
        """A manifest by its id. Raises FileNotFoundError, and DiskFailed or Leased if it is unreadable."""
        return catalog.read_manifest(self._layout, manifest)

    def has(self, manifest: str) -> bool:
        """Whether a manifest is recorded."""
        return self._layout.manifest(manifest).exists()

    def ids(self) -> list[str]:
        """The ids of all recorded manifests, sorted."""
        names = os.listdir(self._layout.manifests)  # a tenth of the time of `glob`, for thousands of models
        return sorted(n.removesuffix(".json") for n in names if n.endswith(".json") and n[0] != ".")

    def unnamed(self) -> list[str]:
        """The ids that no name uses, neither a ready nor a quarantined one."""
        used = self._names.manifests()
        return [manifest for manifest in self.ids() if manifest not in used]

    def readable(self, among: Collection[str] | None = None) -> Iterator[tuple[str, Manifest]]:
        """The manifests that can be read, each with its id. None: among all. The others are logged."""
        for manifest in self.ids():
            if among is not None and manifest not in among:
                continue
            try:
                yield manifest, self.read(manifest)
            except FileNotFoundError:  # removed meanwhile
                continue
            except (DiskFailed, Leased) as error:
                log.warning("unreadable snapshot skipped", manifest=manifest, reason=error.detail)

    def with_names(self) -> Iterator[tuple[Manifest, list[Snapshot]]]:
        """Every manifest with its ready names. It has none if a newer snapshot replaced it.

        Quarantined snapshots are left out: a repair will either restore or remove them.
        """
        damaged = {each.snapshot.manifest for each in self._names.quarantined()}
        for _, manifest in self.readable(set(self.ids()) - damaged):
            yield manifest, self._names.of(manifest.id)

    def blobs(self) -> set[Digest]:
        """The blobs of every recorded snapshot, named or not. Raises DiskFailed if one is unreadable."""
        found: set[Digest] = set()
        for manifest in self.ids():
            with suppress(FileNotFoundError):  # removed meanwhile
                found.update(f.blob for f in self.read(manifest).files)
        return found

    # --- what is known of the files of one base, which is a ref without its revision ---

    def as_kept(self, manifest: Manifest) -> Manifest:
        """The manifest, completed by what this node knows of its files.

        `manifest` is as its source lists it. Recorded manifests of the same base say which blob has a file's
        content (`File.kept`, if the blob has another name than the file's own), and the sha256 that cachd
        computed (`File.sha256`). If the source states the sha256 of a file, the content may also be in a blob
        that was found to have this sha256.
        """
        known: dict[tuple[Digest, int], File] = {}
        for recorded in self._of_base(manifest.base):
            for file in recorded.files:
                if file.kept and self._content.has(file):
                    known[file.stated, file.size] = file
                elif file.sha256:
                    known.setdefault((file.stated, file.size), replace(file, kept=None))

        def annotated(file: File) -> File:
            found = known.get((file.stated, file.size))
            kept, sha256 = (found.kept, found.sha256) if found else (self._content.alike(file), None)
            is_same = (file.kept, file.sha256) == (kept, sha256)
            return file if is_same else replace(file, kept=kept, sha256=sha256)

        files = tuple([annotated(file) for file in manifest.files])
        is_same = all(a is b for a, b in zip(files, manifest.files, strict=True))
        return manifest if is_same else replace(manifest, files=files)

    def owned(self, base: str) -> set[Digest]:
        """The blobs of every recorded snapshot of one base."""
        return {f.blob for manifest in self._of_base(base) for f in manifest.files}

    def _of_base(self, base: str) -> Iterator[Manifest]:
        """The recorded manifests of one base. Unreadable ones are skipped."""
        for each in self.ids():
            if self._bases.get(each, base) == base:
                with suppress(FileNotFoundError, DiskFailed, Leased):
                    manifest = self.read(each)
                    self._bases[each] = manifest.base
                    if manifest.base == base:
                        yield manifest

    def with_copied(self, manifest: Manifest) -> Manifest:
        """The manifest, with the copies that the same snapshot has under another name.

        These stay as long as the snapshot does.
        """
        with suppress(FileNotFoundError, DiskFailed, Leased):
            copied = {*manifest.copied, *self.read(manifest.id).copied}
            return replace(manifest, copied=tuple(sorted(copied)))
        return manifest

    # --- writing; the caller holds `Names.changing`, except for `record_hashes` ---

    def record(self, manifest: Manifest, *folders: str) -> None:
        """Write a manifest to disk, with every folder of the Hub view that ever showed it. Raises OSError."""
        path = self._layout.manifest(manifest.id)
        shown = {*folders, *catalog.read_shown(path)}
        hashes = {f.path: sha256 for f in manifest.files if (sha256 := self._content.hashes.of(f))}
        document = manifest.as_document(hashes) | {"shown": sorted(shown)}
        durable.write_file(path, json.dumps(document).encode())
        self._content.hashes.recorded({f.blob for f in manifest.files})

    def shown_in(self, manifest: str) -> list[str]:
        """The folders of the Hub view that ever showed a manifest; none if it is missing or unreadable."""
        return catalog.read_shown(self._layout.manifest(manifest))

    def remove(self, manifest: str) -> None:
        """Delete a manifest. The last step of removing a snapshot. Raises OSError."""
        self._bases.pop(manifest, None)
        durable.remove(self._layout.manifest(manifest))

    def record_hashes(self) -> None:
        """Add newly computed sha256 of blobs to the recorded manifests. Raises NoSpace, DiskFailed."""
        if not (found := self._content.hashes.unrecorded()):
            return
        # If a write below fails, a later publish of the file writes its sha256, or a scrub after a restart of
        # the daemon computes it again.
        self._content.hashes.recorded(found)
        with self._names.changing():
            for _, manifest in self.readable():
                if any(f.blob in found and f.sha256 is None for f in manifest.files):
                    self.record(manifest)
