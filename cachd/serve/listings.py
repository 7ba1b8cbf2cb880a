"""Describes a revision as the API of the Hub does. Clients read sizes, digests and paths from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from cachd.model import File, Manifest, commit_of
from cachd.model.hub import lfs_pointer, lfs_pointer_id

PAGE = 1000  # entries of a tree in one answer, as on the Hub


def etag_of(file: File) -> str:
    """The ETag of a file, by which clients name blobs: a digest that identifies its content."""
    is_weak = file.stated.algorithm == "origin"
    return (file.known_sha256 if is_weak and file.known_sha256 else file.stated).hex


def info(repo: str, manifest: Manifest, *, blobs: bool) -> dict[str, Any]:
    """The description of a repository at one commit. `blobs`: with the size and digest of each file."""
    commit = commit_of(manifest)
    return {
        "_id": hashlib.sha256(repo.encode()).hexdigest()[:24],
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [_sibling(file, blobs=blobs) for file in manifest.files],
    }


def _sibling(file: File, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    shown: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": _oid(file)}
    if (lfs := _lfs(file)) is not None:
        shown["lfs"] = {"sha256": lfs.pop("oid"), **lfs}
    return shown


def tree(manifest: Manifest, directory: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """The entries below a directory by path; None if there is no such directory."""
    under = f"{directory}/" if directory else ""
    entries = [each for each in _entries(manifest) if each["path"].startswith(under)]
    if not entries:
        return None
    if not recursive:
        entries = [each for each in entries if "/" not in each["path"].removeprefix(under)]
    return entries


def some(manifest: Manifest, paths: Iterable[str]) -> list[dict[str, Any]]:
    """The entries with these paths; those that do not exist are left out."""
    entries = {each["path"]: each for each in _entries(manifest)}
    return [entries[path] for path in dict.fromkeys(paths) if path in entries]


def _entries(manifest: Manifest) -> list[dict[str, Any]]:
    """All files and directories of a commit, sorted by path."""
    directories = {
        file.path[:at] for file in manifest.files for at, letter in enumerate(file.path) if letter == "/"
    }
    shown = [
        {"type": "directory", "oid": _opaque(f"{manifest.id}/{path}"), "size": 0, "path": path}
        for path in directories
    ]
    return sorted([*shown, *map(_entry, manifest.files)], key=lambda each: each["path"])


def _entry(file: File) -> dict[str, Any]:
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


def _lfs(file: File) -> dict[str, Any] | None:
    """The description of a file in git-lfs; None if the commit has the file itself."""
    sha256 = file.known_sha256
    if _git_id(file) is not None or sha256 is None:
        return None
    pointer = lfs_pointer(sha256.hex, file.size)
    return {"oid": sha256.hex, "size": file.size, "pointerSize": len(pointer)}


def _opaque(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
