"""file:// : a shared volume, such as NFS, Lustre or a CSI mount."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from cachd.errors import Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Digest, Extent, File, Manifest, Ref, check_path, quoted
from cachd.policy.reach import Reach
from cachd.sources import sums
from cachd.sources.source import Cut


class ShareSource:
    """A file or a directory of a mounted share. Digests come from its SHA256SUMS, where it has one.

    Links are followed as long as they end under an allowed prefix.
    """

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def resolve(self, ref: Ref) -> Manifest:
        """See `Source.resolve`."""
        top = Path("/" + unquote(ref.location).strip("/"))
        with _share_errors(top):
            self._check(top)
            if top.is_dir() and ref.digest:
                raise Invalid(f"{top} is a directory, and a digest is of one file", code="bad_ref")
            if top.is_dir():
                told = self._sums(top)
                found = [self._file(path, path.relative_to(top).as_posix(), told) for path in self._walk(top)]
                if absent := told.keys() - {f.path for f in found}:
                    raise NotFound(
                        f"{top} lacks {sorted(absent)[0]}, which its {sums.NAME} lists",
                        code="file_not_found",
                        mend="copy the model to the share again",
                    )
            else:
                found = [self._file(top, top.name, {top.name: ref.digest} if ref.digest else {})]
        told_all = "".join(f"{f.path}\n{f.size}\n{f.blob}\n" for f in sorted(found, key=lambda f: f.path))
        return Manifest(ref.base, hashlib.sha256(told_all.encode()).hexdigest(), tuple(found))

    def open(self, file: File, extent: Extent, cut: Cut) -> ShareBody:  # noqa: ARG002
        """See `Source.open`."""
        path = Path(unquote(urlsplit(file.origin).path))
        with _share_errors(path):
            self._check(path)
            return ShareBody(path, file, extent)

    def anew(self) -> None:
        """See `Source.anew`: a file system has one way."""

    def _check(self, path: Path) -> None:
        self._reach.check_url(urlsplit(f"file://{quoted(str(path))}"))
        real = path.resolve(strict=True)
        self._reach.check_url(urlsplit(f"file://{quoted(str(real))}"))

    def _walk(self, top: Path) -> Iterator[Path]:
        for at, folders, names in os.walk(top, onerror=_raise):
            folders.sort()
            for name in sorted(names):
                path = Path(at) / name
                if path != top / sums.NAME:
                    yield path
            for name in folders:
                if (Path(at) / name).is_symlink():
                    raise Invalid(f"{Path(at) / name} is a link to a directory", code="unsafe_path")

    def _sums(self, top: Path) -> dict[str, Digest]:
        listing = top / sums.NAME
        return sums.parse(listing.read_bytes(), str(listing)) if listing.is_file() else {}

    def _file(self, path: Path, shown: str, digests: dict[str, Digest]) -> File:
        check_path(shown)
        self._check(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{path} is neither a file nor a directory", code="unsafe_path")
        return File(shown, status.st_size, f"file://{quoted(str(path))}", digests.get(shown), _mark(status))


class ShareBody:
    """The bytes of one extent of a file on a share."""

    def __init__(self, path: Path, file: File, extent: Extent) -> None:
        self._path, self._offset, self._stop = path, extent.start, extent.stop
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        self._mark = file.validator
        if _mark(status) != self._mark:
            os.close(self._fd)
            raise Changed(f"{path}: the file is not what it was when it was listed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        view = view[: self._stop - self._offset]
        got = 0
        with _share_errors(self._path):
            while got < len(view):
                n = os.preadv(self._fd, [view[got:]], self._offset + got)
                if not n:
                    raise Changed(f"{self._path}: the file ends at {self._offset + got}")
                got += n
            if _mark(os.fstat(self._fd)) != self._mark:
                raise Changed(f"{self._path}: the file was written while it was read")
        self._offset += got
        return got

    def abort(self) -> None:
        """See `Body.abort`: a read of a share cannot be cut, it ends when the share answers."""


@contextmanager
def _share_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(
            f"{error.filename or path} does not exist", code="file_not_found", mend="is the share mounted?"
        ) from error
    except PermissionError as error:
        raise Forbidden(
            f"{error.filename or path} may not be read",
            code="source_forbidden",
            mend="check its mode and owner",
        ) from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}", code="share_failed") from error


def _raise(error: OSError) -> None:
    raise error


def _mark(status: os.stat_result) -> str:
    """What tells one state of a file from another."""
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
