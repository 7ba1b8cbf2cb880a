"""Says which downloads of huggingface_hub into a directory of a shared volume have not ended.

    models--org--m/
        blobs/<digest>[.<id>].incomplete    a download has not ended, unless `blobs/<digest>` is there
        trees/<commit>.json                 {"files": {PATH: {"blob_id": ..., "lfs_sha256": ...}}}: which
                                            digests belong to which revision (huggingface_hub 2 writes it)
    a directory of `hf download --local-dir`
        .cache/huggingface/download/<hash>.<digest>[.<id>].incomplete
        .cache/huggingface/download/PATH.metadata    the commit and the digest of a file that is complete

A file without `.incomplete` in its name is complete: huggingface_hub renames it at the end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path

from cachd import files
from cachd.errors import CachdError, Invalid
from cachd.foreign import Limit, load_json
from cachd.model import MAX_FILES, Entries
from cachd.sources import beneath

_SUFFIX = ".incomplete"
_TREE = Limit(48 << 20, tokens=20 * MAX_FILES)
_LONGEST_NOTE_BYTES = 1024

Names = Callable[[str], list[str]]  # the sorted names in a directory below the repository
Read = Callable[[str, int], bytes]  # a file below the repository, of so many bytes at most


def unfinished_of(commit: str, here: Set[str], names: Names, read: Read) -> list[str]:
    """The names of blobs that are still being downloaded, and that may be for this revision.

    `here`: the paths of the files that the revision's snapshot has. Without the tree of the revision, the
    trees of others must show that a blob is for one of them: that each of its paths is in the snapshot, too.
    """
    blobs = names("blobs")
    complete = frozenset(blobs)
    unfinished = {
        name: digest
        for name in blobs
        if name.endswith(_SUFFIX) and (digest := name.partition(".")[0]) not in complete
    }
    if not unfinished:
        return []
    own = _tree(f"trees/{commit}.json", read)
    others = [] if own is not None else [_tree(f"trees/{name}", read) for name in names("trees")]

    def is_of_another(digest: str) -> bool:
        if own is not None:
            return not own.get(digest, frozenset()) - here
        paths = frozenset[str]().union(*(tree.get(digest, frozenset()) for tree in others if tree))
        return bool(paths) and paths <= here

    return [name for name, digest in unfinished.items() if not is_of_another(digest)]


def explains(newer: Set[str], blobs: Mapping[str, str], unfinished: Iterable[str]) -> bool:
    """Whether a newer snapshot may be the one that these blobs are downloaded for.

    `newer`: its paths. `blobs`: the paths of the older snapshot, and the name of the blob of each. The newer
    one has no other paths, and lacks as many as are downloaded, of files of the same kind: a large file has
    a name of 64 digits. huggingface_hub makes the directory of a snapshot before it downloads its files.
    """
    if not newer <= blobs.keys():
        return False
    lacking = Counter(len(blob) for path, blob in blobs.items() if path not in newer)
    wanted = Counter(len(name.partition(".")[0]) for name in unfinished)
    return wanted <= lacking


def _tree(path: str, read: Read) -> Mapping[str, frozenset[str]] | None:
    """The paths of each digest in a revision; None if that is not known."""
    try:
        document = load_json(read(path, _TREE.size_bytes), path, _TREE)
        found: dict[str, frozenset[str]] = {}
        for name, entry in document["files"].items():
            digest = str(entry.get("lfs_sha256") or entry["blob_id"])
            found[digest] = found.get(digest, frozenset()) | {name}
        return found
    except files.UNREADABLE:
        return None


def unfinished_in(top: Path, check: Callable[[Path], Path]) -> Iterator[tuple[str, Invalid]]:
    """Yields what a download with `--local-dir` into a directory has not ended: a path, and the error."""
    notes = top / ".cache/huggingface/download"
    entries = Entries(str(notes))
    with suppress(OSError, CachdError):
        for at, _, names in os.walk(check(notes)):
            unfinished = [name for name in names if name.endswith(_SUFFIX)]
            for name in names:
                entries.add(name)
            done = {_digest(Path(at) / name) for name in names if unfinished and name.endswith(".metadata")}
            for name in unfinished:
                if name.split(".")[1] not in done:
                    yield str((Path(at) / name).relative_to(check(top))), still(top, name)


def still(shown: Path, name: str) -> Invalid:
    """The error for a download that has not ended."""
    return Invalid(
        f"{shown} is incomplete: {name!r:.120} is still being downloaded",
        code="incomplete_model",
        hint="let the download end, or remove the file if nothing downloads into the directory",
    )


def _digest(note: Path) -> str:
    """The digest in the note about a complete file; empty if there is none."""
    with suppress(OSError, CachdError, IndexError):
        descriptor = beneath.open_file(note)
        try:
            content = files.content_of(descriptor, at_most=_LONGEST_NOTE_BYTES)
        finally:
            os.close(descriptor)
        return content.decode(errors="replace").splitlines()[1]
    return ""
