"""Reads a repository in a Hub cache on a shared volume: its revisions, and the digests of its files.

    models--org--m/
        refs/main                       a branch: the commit that it names
        snapshots/<commit>/config.json -> ../../blobs/<digest>
        blobs/<digest>                  a file, named after the sha256 or git-sha1 of its content
        blobs/<digest>                  or, in huggingface_hub 2: -> ../../blobs/<2 digits>/<hash of Xet>
        blobs/<digest>.<id>.incomplete  a download that has not ended

A cache is not trusted: the digest in a blob's name is verified like any other that a source states.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachd import files
from cachd.errors import Forbidden, Invalid, NotFound
from cachd.model import COMMIT, HUB_FOLDER, SHORTENED, Digest, Entries
from cachd.sources import beneath
from cachd.sources.hub_downloads import explains, still, unfinished_of

_MAX_SHOWN = 20
_MAX_REF_BYTES = 1024
_DIGESTS = {40: "git-sha1", 64: "sha256"}
_HEX = re.compile(r"[0-9a-f]+")


class Snapshot(NamedTuple):
    """One revision in a cache: its directory and the directory's name, which usually is a commit."""

    directory: Path
    name: str

    @property
    def commit(self) -> str | None:
        """The commit, if the name is one."""
        return self.name if COMMIT.fullmatch(self.name) else None


class HubCache:
    """The repository in `directory` of a Hub cache.

    `check` returns a path with its links resolved, or refuses it. Methods raise OSError.
    """

    def __init__(self, directory: Path, check: Callable[[Path], Path]) -> None:
        self.directory, self._check = directory, check
        self._blobs = Path(os.path.realpath(directory)) / "blobs"

    @classmethod
    def around(cls, path: Path, check: Callable[[Path], Path]) -> HubCache | None:
        """The repository at `path`, or that of the snapshot at or above `path`; None if there is none."""
        for above in (path, *path.parents):
            if HUB_FOLDER.fullmatch(above.name):
                with suppress(Forbidden):  # only a part of it may be read
                    check(above)
                    is_part = above == path or path.relative_to(above).parts[0] == "snapshots"
                    has = any((above / each).is_dir() for each in ("snapshots", "refs", "blobs"))
                    return cls(above, check) if is_part and has else None
        return None

    def snapshot(self, revision: str | None) -> Snapshot:
        """The snapshot of a branch, a tag or a commit; of `main`, or of the only one, if `revision` is None.

        A commit may be shortened. Raises NotFound if the cache lacks it, or has several that begin so.
        """
        named = self._ref(revision or "main") or revision
        here = [name for name in self._names("snapshots") if (self.directory / "snapshots" / name).is_dir()]
        if named is None or (named not in here and SHORTENED.fullmatch(named)):
            found = [name for name in here if name.startswith(named or "")]
            named = found[0] if len(found) == 1 else named
        if named is None or named not in here:
            branches = [name for name in self._names("refs") if self._ref(name)]
            raise NotFound(
                f"{self.directory} has no snapshot of {revision or 'main'!r}",
                code="revision_not_found",
                hint=f"it has {_listed([*branches, *here]) or 'none'}; write {self.directory}@REVISION",
            )
        return Snapshot(self.directory / "snapshots" / named, named)

    def digest(self, path: Path, real: Path) -> Digest | None:
        """The digest that the name of one of the repository's own blobs states; None for any other file.

        `path` is a file of a snapshot, and `real` the file without links. A blob may itself be a link to the
        store of all repositories, where names are no digests.
        """
        blob = real if real.parent == self._blobs else _target(path)
        algorithm = _DIGESTS.get(len(blob.name))
        if blob.parent != self._blobs or algorithm is None or not _HEX.fullmatch(blob.name):
            return None
        return Digest(algorithm, blob.name)

    def check_complete(self, place: Path) -> None:
        """Raises Invalid while a download of the revision of which `place` is a part has not ended.

        Its snapshot may then lack files. A download of another revision does not matter.
        """
        name = (*place.relative_to(self.directory).parts, "", "")[1]
        blobs = self._blobs_of(name) if name else {}
        unfinished = unfinished_of(name, blobs.keys(), self._names, self._content)
        if unfinished and not (name and self._are_of_a_newer_one(name, blobs, unfinished)):
            raise still(self.directory, unfinished[0])

    def _are_of_a_newer_one(self, name: str, blobs: Mapping[str, str], unfinished: list[str]) -> bool:
        """Whether a snapshot that changed later than this one explains all unfinished blobs.

        The notes of huggingface_hub 2 say more: with those of this revision, they alone decide.
        """
        if f"{name}.json" in self._names("trees"):
            return False
        changed = self._changed(name)
        return any(
            other != name
            and self._changed(other) > changed
            and explains(self._blobs_of(other).keys(), blobs, unfinished)
            for other in self._names("snapshots")
        )

    def _changed(self, snapshot: str) -> int:
        """When a file was last added to a snapshot, in nanoseconds."""
        return self._check(self.directory / "snapshots" / snapshot).stat().st_mtime_ns

    def _blobs_of(self, snapshot: str) -> dict[str, str]:
        """The paths of the files in a snapshot, and the name that each leads to. Links are not followed."""
        top = self._check(self.directory / "snapshots" / snapshot)
        entries, found = Entries(str(top)), dict[str, str]()
        for at, _, names in os.walk(top):
            for name in names:
                file = Path(at) / name
                path = str(file.relative_to(top))
                entries.add(path)
                found[path] = file.readlink().name if file.is_symlink() else ""
        return found

    def _ref(self, revision: str) -> str | None:
        """The commit that a branch or a tag names; None if there is none of this name."""
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, Invalid):
            named = self._content(f"refs/{revision}", _MAX_REF_BYTES).decode(errors="replace").strip()
            return named if named and "/" not in named and named not in (".", "..") else None
        return None

    def _content(self, path: str, at_most: int) -> bytes:
        """The content of a file of the repository."""
        descriptor = beneath.open_file(self._check(self.directory / path))
        try:
            return files.content_of(descriptor, at_most=at_most)
        finally:
            os.close(descriptor)

    def _names(self, below: str) -> list[str]:
        """The sorted names in a directory of the repository; none if there is no such directory."""
        entries = Entries(str(self.directory))
        with suppress(FileNotFoundError, NotADirectoryError):
            descriptor = beneath.open_directory(self._check(self.directory / below))
            try:
                with os.scandir(descriptor) as found:
                    for entry in found:
                        entries.add(entry.name)
                with os.scandir(descriptor) as found:
                    return sorted(entry.name for entry in found)
            finally:
                os.close(descriptor)
        return []


def _target(path: Path) -> Path:
    """Where a link leads, if its target is a link, too; `path` if it is no link."""
    if not path.is_symlink():
        return path
    target = path.parent / path.readlink()
    return Path(os.path.realpath(target.parent), target.name)


def check_is_one_model(top: Path, check: Callable[[Path], Path]) -> None:
    """Raises Invalid if a directory is a complete Hub cache, with its repositories in it or in `hub/`."""
    for cache in (top, top / "hub"):
        found: list[str] = []
        with suppress(OSError, Forbidden):
            found = sorted(_repositories(check(cache)))
        if found:
            at = "" if cache == top else "hub/"
            raise Invalid(
                f"{top} is a cache of the Hub with {len(found)} repositories, not a model:"
                f" {_listed([at + name for name in found])}",
                code="several_models",
                hint=f"pull one of them, such as file://{cache / found[0]}; it appears in its Hub folder only"
                " if the request gives its hub_id",
            )


def _repositories(cache: Path) -> Iterator[str]:
    with os.scandir(cache) as found:
        for entry in found:
            if HUB_FOLDER.fullmatch(entry.name) and (cache / entry.name / "snapshots").is_dir():
                yield entry.name


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(repr(name)[1:-1][:120] for name in names[:_MAX_SHOWN]) + (
        f" and {more} more" if more > 0 else ""
    )
