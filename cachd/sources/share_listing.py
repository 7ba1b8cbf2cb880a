"""Makes the files of a manifest from a directory of a shared volume, or from a single file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from cachd import files
from cachd.errors import Forbidden, Invalid, NotFound
from cachd.foreign import too_large
from cachd.model import Digest, File, Manifest, Unusable, check_path, quoted
from cachd.model.leftovers import control_files, is_left_out, not_ended
from cachd.sources import checksums
from cachd.sources.hub_cache import HubCache, check_is_one_model
from cachd.sources.hub_downloads import unfinished_in
from cachd.sources.share_walk import Found, Walk, regular, unreadable

_FORM: Literal["NFC"] = "NFC"


class Listing:
    """The files at `top`. `cache`: the repository of a Hub cache that they belong to, if any.

    `check` returns a path with its links resolved, or refuses it; `opened` opens a path for reading.

    A file with several names, by symbolic or hard links, has one origin: the first of its names in order. So
    it is read once.
    """

    def __init__(
        self,
        top: Path,
        cache: HubCache | None,
        check: Callable[[Path], Path],
        opened: Callable[[Path], int],
        max_files: int,
    ) -> None:
        self._top, self._cache, self._check, self._opened = top, cache, check, opened
        self._max_files = max_files
        self._digests: dict[str, Digest] = {}
        self._by_form: dict[str, str] = {}
        self._stated: set[str] = set()
        self._files: list[File] = []
        self._unusable: list[Unusable] = []
        self._origins: dict[object, str] = {}

    def read(self, digest: Digest | None) -> Iterator[None]:
        """Read it; yields for each file and directory. `digest`: that of a single file.

        Raises OSError, Invalid, NotFound and Forbidden.
        """
        top = self._top
        if not top.is_dir():
            self._digests = {top.name: digest} if digest else {}
            real = self._check(top)
            for control in filter(os.path.lexists, control_files(top)):
                raise not_ended(control)
            self._add(Found(check_path(top.name), top, real, regular(top, os.lstat(real))))
            return
        if digest:
            raise Invalid(f"{top} is a directory, but a ref with a digest names one file", code="bad_ref")
        check_is_one_model(top, self._check)
        self._digests = self._checksums(top / checksums.NAME)
        self._by_form = {normalize(_FORM, path): path for path in self._digests}
        for found in Walk(top, self._check, self._max_files).found():
            if isinstance(found, Unusable):
                self._unusable.append(found)
            elif found is not None and found.shown != checksums.NAME:
                self._add(found)
            yield
        self._unusable.extend(Unusable(*each) for each in unfinished_in(top, self._check))
        self._check_listed()

    def manifest(self, base: str, revision: str | None) -> Manifest:
        """The manifest of what was read. `revision`: None for a hash of the files."""
        if not self._files and self._unusable:
            raise self._unusable[0].error
        if revision is None:
            state = "".join(f"{f.path}\n{f.size}\n{f.stated}\n" for f in sorted(self._files, key=_path))
            revision = hashlib.sha256(state.encode()).hexdigest()
        return Manifest(base, revision, tuple(self._files), unusable=tuple(self._unusable))

    def _add(self, found: Found) -> None:
        status = found.status
        if not status.st_size and (error := self._why_not_empty(found)):
            self._unusable.append(Unusable(found.shown, error))
            return
        mark = mark_of(status)
        # A FUSE mount may number its inodes anew at any time, but then it shows no hard links.
        is_linked = status.st_nlink > 1
        same = (status.st_dev, status.st_ino, mark) if is_linked else str(found.real)
        origin = self._origins.setdefault(same, f"file://{quoted(str(found.path))}")
        digest = self._digest(found.shown)
        if self._cache is not None and (named := self._cache.digest(found.path, found.real)):
            origin, digest = f"file://{quoted(str(found.real))}", digest or named
        self._files.append(File(found.shown, status.st_size, origin, digest, mark))

    def _digest(self, shown: str) -> Digest | None:
        """The digest that SHA256SUMS states of a file.

        macOS and some file servers decompose letters (NFD), so a name may be listed in another form.
        """
        listed = shown if shown in self._digests else self._by_form.get(normalize(_FORM, shown), shown)
        self._stated.add(listed)
        return self._digests.get(listed)

    def _why_not_empty(self, found: Found) -> Forbidden | Invalid | None:
        """Why a file of no bytes cannot be taken: some FUSE mounts do not know sizes, and say 0."""
        try:
            descriptor = self._opened(found.path)
        except PermissionError as error:
            return unreadable(found.path, error)
        try:
            if not os.read(descriptor, 1):
                return None
        finally:
            os.close(descriptor)
        return Invalid(
            f"{found.path} has bytes, though its file system says that it has none",
            code="size_unknown",
            hint="copy the file to another place, or mount the share with a tool that knows the sizes",
        )

    def _checksums(self, listing: Path) -> dict[str, Digest]:
        """The digests in the directory's SHA256SUMS, by path; empty when there is none."""
        if not self._check(listing).is_file():
            return {}
        descriptor = self._opened(listing)
        try:
            content = files.content_of(descriptor, at_most=checksums.LONGEST_BYTES)
        except files.TooLong as error:
            raise too_large(str(listing), checksums.LONGEST_BYTES, error.size) from error
        finally:
            os.close(descriptor)
        return checksums.parse(content, str(listing))

    def _check_listed(self) -> None:
        """Raises NotFound if SHA256SUMS lists a file that is not there."""
        unusable = tuple(each.path for each in self._unusable)
        for path in sorted(self._digests.keys() - self._stated):
            if not (
                is_left_out(path) or any(path == u or (u[-1] == "/" and path.startswith(u)) for u in unusable)
            ):
                raise NotFound(
                    f"{self._top} has no {path}, which its {checksums.NAME} lists",
                    code="file_not_found",
                    hint="copy the model to the shared volume again",
                )


def mark_of(status: os.stat_result) -> str:
    """A text that changes when the file changes or is replaced by another.

    It does not contain the inode number, because FUSE mounts may give a file another one at each open.
    """
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _path(file: File) -> str:
    return file.path
