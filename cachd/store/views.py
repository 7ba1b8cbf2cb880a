"""The shapes a snapshot is shown in: a plain directory and a Hub cache, both of hard links.

The Hub view follows huggingface_hub's cache (docs: "Understand caching"): `refs/<revision>` holds the
commit with no newline, `snapshots/<commit>/` the files, `trees/<commit>.json` their list, which makes an
offline client notice a missing file. Plain files in `snapshots/` are the client's own no-symlink form.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from cachd.errors import Leased
from cachd.model import Digest, File, Manifest
from cachd.store import durable
from cachd.store.content import ContentStore
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class _View:
    _directory_mode = 0o755

    def __init__(self, layout: Layout, content: ContentStore) -> None:
        self._layout, self._content = layout, content

    def _link(self, files: Mapping[str, File], target: Path) -> None:
        """Link every file below `target` and make all the names durable, bottom up."""
        target.mkdir(exist_ok=True)
        for folder in {os.path.dirname(path) for path in files}:
            (target / folder).mkdir(parents=True, exist_ok=True)
        beside = self._layout.staging / "link"
        for path, file in files.items():
            durable.link(self._content.at(file.blob), f"{target}/{path}", beside=beside)
        for directory in _directories(target):
            directory.chmod(0o755)
            durable.sync_directory(directory)

    def _stage(self, files: Mapping[str, File], target: Path) -> None:
        """Build `target` out of sight and show it in one step; a failure leaves nothing."""
        staged = self._layout.staging / target.name
        durable.remove_tree(staged)
        try:
            self._link(files, staged)
            durable.move(staged, target)
        except BaseException:
            durable.remove_tree(staged)
            raise

    def _hide(self, target: Path, paths: Iterable[str]) -> None:
        """Take files out of a directory that stays."""
        for path in paths:
            with suppress(FileNotFoundError, NotADirectoryError):
                place = target / path
                mode = place.parent.stat().st_mode
                place.parent.chmod(0o755)
                durable.remove(place)
                place.parent.chmod(mode)

    def _wrong(self, files: Mapping[str, File], target: Path) -> dict[str, bool]:
        """The paths below `target` that are not the blobs they should be; whether something else is there.

        Modes that somebody changed are put right.
        """
        for below in directories_of(files):
            durable.keep_mode(f"{target}/{below}", self._directory_mode)
        wrong = [
            path
            for path, file in files.items()
            if not _is_link_to(self._content.at(file.blob), f"{target}/{path}")
        ]
        return {path: os.path.lexists(target / path) for path in wrong}


class PlainView(_View):
    """`models/.trees/<id>`: one immutable directory a manifest."""

    _directory_mode = 0o555

    def build(self, manifest: Manifest) -> None:
        """Show the manifest's files, durably, before any name points at them."""
        tree, files = self._layout.tree(manifest.id), {f.path: f for f in manifest.files}
        if tree.exists():
            if self._wrong(files, tree):
                for directory in _directories(tree):
                    directory.chmod(0o755)
                self._link(files, tree)  # a blob was fetched anew: its links follow, one by one
        else:
            self._stage(files, tree)
        for directory in _directories(tree):
            directory.chmod(self._directory_mode)
        durable.sync_directory(tree.parent)

    def hide(self, manifest: str, paths: Iterable[str]) -> None:
        """Take damaged files out of the tree, until it is built again."""
        self._hide(self._layout.tree(manifest), paths)

    def wrong(self, manifest: Manifest) -> dict[str, bool]:
        """The paths of the tree that are not the manifest's blobs; whether something else is there."""
        return self._wrong({f.path: f for f in manifest.files}, self._layout.tree(manifest.id))

    def remove(self, manifest: str) -> None:
        """Take the tree out of sight in one step, then delete it. Readers keep what they have open."""
        tree, trash = self._layout.tree(manifest), self._layout.trash / manifest
        durable.remove_tree(trash)
        with suppress(FileNotFoundError):
            tree.chmod(0o755)  # moving a directory rewrites its '..'
            durable.take_away(tree, trash)
            durable.sync_directory(tree.parent)
        durable.remove_tree(trash)


class HubView(_View):
    """`hub/models--org--name`: every snapshot of one repository, one directory a commit.

    Pulls of one commit under different names or patterns share that directory: it shows all their files.
    """

    def build(self, folder: str, commit: str, files: Mapping[str, File]) -> None:
        """Show `files`, the union over all snapshots of this commit, durably; no branch names it yet."""
        repo = self._layout.hub / folder
        (repo / "snapshots").mkdir(parents=True, exist_ok=True)
        target = repo / "snapshots" / commit
        if target.exists():
            self._link(files, target)
        else:
            self._stage(files, target)
        durable.sync_directory(target.parent)
        (repo / "trees").mkdir(exist_ok=True)
        durable.write_file(repo / "trees" / f"{commit}.json", _tree_document(files))
        durable.sync_directory(repo)
        durable.sync_directory(self._layout.hub)

    def hide(self, folder: str, commit: str, paths: Iterable[str]) -> None:
        """Take damaged files out of a commit's directory, until it is built again."""
        self._hide(self._layout.hub / folder / "snapshots" / commit, paths)

    def wrong(self, folder: str, commit: str, files: Mapping[str, File]) -> dict[str, bool]:
        """The paths of a commit's directory that are not their blobs; whether something else is there."""
        return self._wrong(files, self._layout.hub / folder / "snapshots" / commit)

    def repair(self, folder: str, commit: str, files: Mapping[str, File]) -> None:
        """Put the modes of a folder right, and the list of a commit's files unless it has all of these."""
        repo = self._layout.hub / folder
        for directory in (repo, repo / "snapshots", repo / "trees", *_directories(repo / "refs")):
            durable.keep_mode(str(directory), self._directory_mode)
        listing = repo / "trees" / f"{commit}.json"
        if not _lists(listing, files):
            durable.make_directories(listing.parent)
            durable.write_file(listing, _tree_document(files))
            log.warning("list of files written again", folder=folder, commit=commit)

    def point(self, folder: str, branches: Mapping[str, str]) -> None:
        """Let exactly these branches and tags name these commits; any other one goes."""
        refs = f"{self._layout.hub}/{folder}/refs"  # text: at a start every folder is looked at
        for at, _, names in os.walk(refs, topdown=False):
            for name in names:
                if f"{at}/{name}".removeprefix(f"{refs}/") not in branches:
                    durable.remove(Path(at, name))
            if at != refs and not os.listdir(at):
                os.rmdir(at)
        for revision, commit in branches.items():
            if not _says(f"{refs}/{revision}", commit):
                ref = Path(refs, revision)
                try:
                    durable.make_directories(ref.parent)
                    durable.write_file(ref, commit.encode())  # no newline: clients compare it unstripped
                except OSError as error:
                    if error.errno in durable.FULL:
                        durable.remove(ref)  # no branch is better than one that names what may go
                    raise

    def narrow(self, folder: str, commit: str, gone: Iterable[str], left: Mapping[str, File]) -> None:
        """Take the paths in `gone` but not in `left` out of a commit's directory, and it when empty."""
        repo = self._layout.hub / folder
        target, listing = repo / "snapshots" / commit, repo / "trees" / f"{commit}.json"
        if left:
            try:
                durable.write_file(listing, _tree_document(left))
            except OSError as error:
                if error.errno not in durable.FULL:
                    raise
                durable.remove(listing)  # without one, a client takes what it finds
            for path in gone:
                if path not in left:
                    durable.remove(target / path)
            return
        durable.remove(listing)
        trash = self._layout.trash / f"{folder}@{commit}"
        durable.remove_tree(trash)
        with suppress(FileNotFoundError):
            durable.take_away(target, trash)
            durable.sync_directory(target.parent)
        durable.remove_tree(trash)
        if not any((repo / "snapshots").glob("*")):
            durable.remove_tree(repo)


def _is_link_to(blob: str, place: str) -> bool:
    try:
        status = os.lstat(place)
        if not os.path.samestat(status, os.lstat(blob)):
            return False
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    durable.keep_mode(place, durable.SEALED, status)
    return True


def directories_of(paths: Iterable[str]) -> list[str]:
    """The directories below a model's own that hold these files, with all above them, and its own as ``."""
    found = {""}
    for parent in {os.path.dirname(path) for path in paths}:
        while parent not in found:
            found.add(parent)
            parent = os.path.dirname(parent)
    return sorted(found)


def _lists(listing: Path, files: Mapping[str, File]) -> bool:
    """Whether a list of files has these, and can be read by everybody. One that is leased is believed."""
    try:
        durable.keep_mode(str(listing), 0o644)
        told = durable.read_document(listing)["files"]
        return all(told.get(path) == _tree_entry(file) for path, file in files.items())
    except Leased:
        return True  # only its owner could have changed it, and whoever holds it cannot
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _says(ref: str, commit: str) -> bool:
    """Whether a branch names a commit. One that cannot be read at once does not: it is made anew."""
    if not os.path.isfile(ref) or os.path.islink(ref):
        return False
    durable.keep_mode(ref, 0o644)
    with suppress(Leased):
        return durable.read_file(ref) == commit.encode()
    return False


def _directories(root: Path) -> list[Path]:
    """`root` and every directory below it, deepest first."""
    return [Path(at) for at, _, _ in os.walk(root, topdown=False)]


def _tree_document(files: Mapping[str, File]) -> bytes:
    """The list of files as huggingface_hub's `trees/<commit>.json` (its `_tree_cache.py`, version 1)."""
    entries = {path: _tree_entry(files[path]) for path in sorted(files)}
    return json.dumps({"format_version": 1, "files": entries}).encode()


def _tree_entry(file: File) -> dict[str, object]:
    digest = file.digest or file.blob
    if digest.algorithm != "sha256":
        return {"size": file.size, "blob_id": digest.hex}
    return {
        "size": file.size,
        "blob_id": _lfs_pointer_id(digest, file.size),
        "lfs_sha256": digest.hex,
        "lfs_size": file.size,
    }


def _lfs_pointer_id(digest: Digest, size: int) -> str:
    """git's id of the pointer file that stands for large content (git-lfs spec, "The Pointer")."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest.hex}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()
