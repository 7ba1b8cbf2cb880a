"""Describes a revision as the API of the Hub does. Clients read sizes, digests and paths from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from cachd.errors import TooBig
from cachd.kernel import threads
from cachd.model import File, Manifest, commit_of
from cachd.model.hub import lfs_pointer, lfs_pointer_id
from cachd.serve.answer import Sink

PAGE = 1000  # entries of a tree in one answer, as on the Hub
MAX_DIRECTORIES = 200_000  # paths of 1,024 bytes may have far more, and each costs as much as a file
_PIECE = 50  # entries in one piece of JSON
Entry = dict[str, Any]


class Listing:
    """A list of JSON objects as the body of an answer. Its memory is that of a few of them.

    `entries`: yields the objects, each time the same ones. `before`, `after`: what surrounds the list.
    """

    waits = False

    def __init__(
        self, entries: Callable[[], Iterable[Entry]], before: bytes = b"", after: bytes = b""
    ) -> None:
        self._entries, self._before, self._after = entries, before, after

    @cached_property
    def size(self) -> int:
        """See `Body`."""
        with threads.in_brief_turns():
            return sum(map(len, self._pieces()))

    def send(self, sink: Sink) -> None:
        """See `Body`."""
        pieces = self._pieces()
        while True:
            with threads.in_brief_turns():  # not while it waits for the client
                piece = next(pieces, None)
            if piece is None:
                return
            sink.send(piece)

    def _pieces(self) -> Iterator[bytes]:
        yield self._before + b"["
        comma = ""
        entries = iter(self._entries())
        while some := list(islice(entries, _PIECE)):
            yield (comma + ", ".join(map(json.dumps, some))).encode()
            comma = ", "
        yield b"]" + self._after


def etag_of(file: File) -> str:
    """The ETag of a file, by which clients name blobs: a digest that identifies its content."""
    is_weak = file.stated.algorithm == "origin"
    return (file.known_sha256 if is_weak and file.known_sha256 else file.stated).hex


def info(repo: str, manifest: Manifest, *, blobs: bool) -> Listing:
    """The description of a repository at one commit. `blobs`: with the size and digest of each file."""
    about = {
        "_id": hashlib.sha256(repo.encode()).hexdigest()[:24],
        "id": repo,
        "modelId": repo,
        "sha": commit_of(manifest),
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [],
    }
    before, _, after = json.dumps(about).encode().rpartition(b"[]")
    return Listing(lambda: (_sibling(file, blobs=blobs) for file in manifest.files), before, after)


def _sibling(file: File, *, blobs: bool) -> Entry:
    if not blobs:
        return {"rfilename": file.path}
    shown: Entry = {"rfilename": file.path, "size": file.size, "blobId": _oid(file)}
    if (lfs := _lfs(file)) is not None:
        shown["lfs"] = {"sha256": lfs.pop("oid"), **lfs}
    return shown


def has_directory(manifest: Manifest, directory: str) -> bool:
    """Whether a commit has a directory with this path; the empty one is the top."""
    return any(file.path.startswith(f"{directory}/") for file in manifest.files) or not directory


def tree(manifest: Manifest, directory: str, *, recursive: bool) -> Iterator[Entry]:
    """Yields the entries below a directory; a directory comes before its files. Raises TooBig."""
    under = f"{directory}/" if directory else ""
    for path, file in _below(manifest, under) if recursive else _directly_below(manifest, under):
        yield _entry(manifest, path, file)


def some(manifest: Manifest, paths: Iterable[str]) -> Listing:
    """The entries with these paths; those that do not exist are left out. Raises TooBig."""
    asked = set(paths)
    found = [(path, file) for path, file in _below(manifest, "") if path in asked]
    return Listing(lambda: (_entry(manifest, path, file) for path, file in found))


def _below(manifest: Manifest, under: str) -> Iterator[tuple[str, File | None]]:
    """Yields the paths of all files and directories that begin with `under`; a directory without a file.

    Files of one directory follow each other, because a manifest is sorted by path.
    """
    before, count = under, 0
    for file in manifest.files:
        if not file.path.startswith(under):
            continue
        at = file.path.find("/", len(under))
        while at != -1:
            if not before.startswith(file.path[: at + 1]):
                yield file.path[:at], None
                count += 1
            at = file.path.find("/", at + 1)
        if count > MAX_DIRECTORIES:
            raise TooBig(f"the commit has more than {MAX_DIRECTORIES} directories", code="too_many_files")
        yield file.path, file
        before = file.path


def _directly_below(manifest: Manifest, under: str) -> Iterator[tuple[str, File | None]]:
    """Yields the files and directories that are directly in `under`, each directory once, without a file."""
    before = ""
    for file in manifest.files:
        if not file.path.startswith(under):
            continue
        name, slash, _ = file.path[len(under) :].partition("/")
        if not slash:
            yield file.path, file
        elif name != before:
            yield f"{under}{name}", None
        before = name if slash else ""


def _entry(manifest: Manifest, path: str, file: File | None) -> Entry:
    if file is None:
        return {"type": "directory", "oid": _opaque(f"{manifest.id}/{path}"), "size": 0, "path": path}
    shown = {"type": "file", "oid": _oid(file), "size": file.size, "path": file.path}
    return shown if (lfs := _lfs(file)) is None else {**shown, "lfs": lfs}


def _oid(file: File) -> str:
    """The git id of a file or of its LFS pointer; 40 other digits if its source has neither."""
    if (git_id := _git_id(file)) is not None:
        return git_id
    sha256 = file.known_sha256
    return lfs_pointer_id(sha256.hex, file.size) if sha256 else _opaque(str(file.stated))


def _git_id(file: File) -> str | None:
    """The git id that its source states; None for a file in LFS, or of a source without git."""
    return file.digest.hex if file.digest is not None and file.digest.algorithm == "git-sha1" else None


def _lfs(file: File) -> Entry | None:
    """The description of a file in git-lfs; None if the commit has the file itself."""
    sha256 = file.known_sha256
    if _git_id(file) is not None or sha256 is None:
        return None
    pointer = lfs_pointer(sha256.hex, file.size)
    return {"oid": sha256.hex, "size": file.size, "pointerSize": len(pointer)}


def _opaque(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
