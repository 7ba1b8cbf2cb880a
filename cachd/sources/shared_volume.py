"""The source of file:// refs: models on a mounted shared volume, such as NFS, Lustre or a CSI mount."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from cachd.errors import Changed, Forbidden, NotFound, Unavailable
from cachd.model import MAX_FILES, Extent, File, Manifest, Ref, quoted
from cachd.policy.address_policy import AddressPolicy
from cachd.sources import beneath
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.detached import DetachedThread, DetachedThreads
from cachd.sources.hub_cache import HubCache
from cachd.sources.share_listing import Listing, mark_of
from cachd.sources.share_walk import loops

READ_BYTES = 1 << 20
MAX_LEFT = 64


class SharedVolumeSource:
    """A file, a directory with or without SHA256SUMS, or a repository of a Hub cache, on a shared volume.

    Symbolic links are followed as long as they end under an allowed prefix. The file system is called in
    detached threads: a volume that does not answer delays its caller by `stall_seconds`. While MAX_LEFT such
    threads are blocked, every further call fails at once.
    """

    def __init__(
        self, address_policy: AddressPolicy, *, stall_seconds: float, max_files: int = MAX_FILES
    ) -> None:
        self._address_policy, self._stall_seconds = address_policy, stall_seconds
        self._max_files = max_files
        self._detached = DetachedThreads(MAX_LEFT)

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        with self._helper(Path(unquote(ref.location))) as thread, cancel_token.reaches(thread):
            steps = self._resolve(ref)
            while not isinstance(step := thread.call(next, steps), Manifest):
                cancel_token.count()
            return step

    def _resolve(self, ref: Ref) -> Iterator[Manifest | None]:
        """Yields None for each file and directory, to show progress, and then the manifest."""
        top = Path("/" + unquote(ref.location).strip("/"))
        with _share_errors(top):
            self._check(top)
            cache = HubCache.around(top, self._check)
            snapshot = cache.snapshot(ref.revision) if cache and cache.directory == top else None
            if ref.revision and snapshot is None:
                raise NotFound(
                    f"{top} is no repository of a Hub cache, and only those have revisions",
                    code="revision_not_found",
                    hint="leave out what follows the '@'",
                )
            yield None
            place = snapshot.directory if snapshot else top
            if cache is not None:
                cache.check_complete(place)
            listing = Listing(place, cache, self._check, self._open, self._max_files)
            yield from listing.read(ref.digest)
        revision = snapshot.commit if snapshot else None
        yield listing.manifest(ref.base, revision)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> SharedVolumeBody:
        """See `Source.open`."""
        path = Path(unquote(urlsplit(file.origin).path))
        with ExitStack() as stack:
            thread = stack.enter_context(self._helper(path))
            with cancel_token.reaches(thread):
                body = SharedVolumeBody(path, file, extent, thread, self._open)
            body.until_closed(stack.pop_all())
            return body

    @contextmanager
    def _helper(self, path: Path) -> Iterator[DetachedThread]:
        """A detached thread for calls about `path`. Raises Unavailable when they get no answer."""
        with _share_errors(path), self._detached.one(self._stall_seconds) as thread:
            yield thread

    def anew(self) -> None:
        """See `Source.anew`. A file system has neither signed URLs nor connections to drop."""

    def _check(self, path: Path) -> Path:
        """The path with its links resolved.

        Raises Forbidden unless `path` and the resolved path are both under an allowed prefix. The error shows
        readers neither where a link leads nor whether its target exists.
        """
        self._address_policy.check_url(urlsplit(f"file://{quoted(str(path))}"))
        real = Path(os.path.realpath(path))  # not strict: its errors would reveal what exists there
        try:
            self._address_policy.check_url(urlsplit(f"file://{quoted(str(real))}"))
        except Forbidden:
            raise Forbidden(
                f"{path} is a symbolic link, or below one, to a place that no prefix of allow covers",
                code="path_refused",
                hint="copy the file to the shared volume; the daemon's log shows where the link leads",
            ).withhold(leads_to=str(real)) from None
        if real.is_symlink():  # realpath leaves a link unresolved that is part of a loop
            raise loops(path)
        return real

    def _open(self, path: Path) -> int:
        """A descriptor of the file at `path`, opened by the resolved path that was checked."""
        return beneath.open_file(self._check(path))


def make(access: Access) -> SharedVolumeSource:
    """The source of all shared volumes."""
    return SharedVolumeSource(access.address_policy, stall_seconds=access.stall_seconds)


class SharedVolumeBody:
    """The bytes of one extent of a file on a shared volume, read in a detached thread."""

    def __init__(
        self, path: Path, file: File, extent: Extent, thread: DetachedThread, opened: Callable[[Path], int]
    ) -> None:
        self._opened = opened
        self._path, self._offset, self._stop = path, extent.start, extent.stop
        self._mark, self._helper = file.validator, thread
        self._closing = ExitStack()
        self._read = memoryview(bytearray(min(READ_BYTES, extent.size)))
        self._fd = thread.call(self._open)

    def until_closed(self, held: ExitStack) -> None:
        """Close `held` together with the body."""
        self._closing = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.__exit__(None, None, None)

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        wanted = min(len(view), self._stop - self._offset, len(self._read))
        if wanted:
            with _share_errors(self._path):
                # Into a buffer of the body's own: an abandoned call may still write to it later.
                self._helper.call(self._fill, self._read[:wanted], self._offset)
            view[:wanted] = self._read[:wanted]
        self._offset += wanted
        return wanted

    def abort(self) -> None:
        """See `Body.abort`."""
        self._helper.abort()

    def _open(self) -> int:
        fd = self._opened(self._path)
        self._helper.held.callback(os.close, fd)
        if mark_of(os.fstat(fd)) != self._mark:
            raise Changed(f"{self._path}: the file has changed since it was listed")
        return fd

    def _fill(self, view: memoryview, offset: int) -> None:
        got = 0
        while got < len(view):
            n = os.preadv(self._fd, [view[got:]], offset + got)
            if not n:
                raise Changed(f"{self._path}: the file has shrunk to {offset + got} bytes")
            got += n
        if mark_of(os.fstat(self._fd)) != self._mark:
            raise Changed(f"{self._path}: the file was changed while it was read")


@contextmanager
def _share_errors(path: Path) -> Iterator[None]:
    """Turn the errors of the file system into cachd's."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(
            f"{error.filename or path} does not exist",
            code="file_not_found",
            hint="check that the shared volume is mounted",
        ) from error
    except PermissionError as error:
        raise Forbidden(
            f"cachd may not read {error.filename or path}",
            code="source_forbidden",
            hint="check its mode and owner",
        ) from error
    except TimeoutError as error:
        raise _stalled(path, str(error)) from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}", code="share_failed") from error


def _stalled(path: Path, why: str) -> Unavailable:
    return Unavailable(
        f"{path}: {why}", code="stalled", hint="check that the server of the shared volume is up"
    )
