"""Shows each snapshot in two views, a plain directory and a Hub cache, both made of hard links to blobs.

A file that a client refuses to read through one of several links is a copy instead: copies.py.

The Hub view has the layout of huggingface_hub's cache (its docs: "Understand caching"):

    refs/<revision>         the commit, without a newline
    snapshots/<commit>/     the files, as regular files: huggingface_hub's own layout without symbolic links
    trees/<commit>.json     the list of the files, by which an offline client notices a missing one

hub_places.py makes what clients look for beside these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from cachd.errors import Leased
from cachd.kernel import durable
from cachd.kernel.content_time import time_of
from cachd.model import File, Manifest, commit_of
from cachd.model.hub import lfs_pointer_id
from cachd.store import hub_places
from cachd.store.content import ContentStore
from cachd.store.copies import Copies, writable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """The content of a commit's directory in the Hub view, for all snapshots of the commit.

    `files`: by path. `copied`: the paths that are copies. `absent`: what the commit is known not to have.
    """

    files: Mapping[str, File]
    copied: Collection[str]
    absent: Collection[str]


class _View:
    _directory_mode = 0o755

    def __init__(self, layout: Layout, content: ContentStore, copies: Copies) -> None:
        self._layout, self._content, self._copies = layout, content, copies

    def _link(self, files: Mapping[str, File], copied: Collection[str], target: Path) -> None:
        """Link or copy every file below `target`, then sync the directories, the deepest first.

        The time of each directory is derived from the name of `target`, which identifies the content.
        """
        for folder in {os.path.dirname(path) for path in files}:
            (target / folder).mkdir(parents=True, exist_ok=True)
        beside = self._layout.staging / "link"
        for path, file in files.items():
            if path in copied:
                self._copies.place(file, f"{target}/{path}")
            else:
                durable.link(self._content.at(file.blob), f"{target}/{path}", beside=beside)
        modified = time_of(hashlib.sha256(target.name.encode()).hexdigest())
        for directory in _directories(target):
            directory.chmod(0o755)
            durable.set_time(directory, modified)
            durable.sync_directory(directory)

    def _stage(self, files: Mapping[str, File], copied: Collection[str], target: Path) -> None:
        """Build `target` in staging and rename it into place. A failure leaves nothing behind."""
        staged = self._layout.staging / target.name
        durable.remove_tree(staged)
        try:
            self._link(files, copied, staged)
            durable.move(staged, target)
        except BaseException:
            durable.remove_tree(staged)
            raise

    def _hide(self, target: Path, paths: Iterable[str]) -> None:
        """Remove files from a directory, and keep the directory."""
        for path in paths:
            place = target / path
            with suppress(FileNotFoundError, NotADirectoryError), writable(place.parent):
                durable.remove(place)

    def _wrong(self, files: Mapping[str, File], copied: Collection[str], target: Path) -> dict[str, bool]:
        """The paths below `target` that have not their blob's content; True where another file is there.

        A link to the blob has it, and an intact copy. A path in `copied` must be a copy.

        Restores the modes of files and directories that somebody changed.
        """
        for below in directories_of(files):
            durable.keep_mode(f"{target}/{below}", self._directory_mode)
        wrong = [
            path
            for path, file in files.items()
            if not (
                (path not in copied and _is_link_to(self._content.at(file.blob), f"{target}/{path}"))
                or self._copies.is_intact(file, f"{target}/{path}")
            )
        ]
        return {path: os.path.lexists(target / path) for path in wrong}


class PlainView(_View):
    """The plain view: one immutable directory for each manifest, `models/.trees/<id>`."""

    _directory_mode = 0o555

    def build(self, manifest: Manifest) -> None:
        """Show the manifest's files durably. The caller lets names point at them only after this."""
        tree, files = self._layout.tree(manifest.id), placed(manifest)
        copied = set(map(manifest.place_of, manifest.copied))
        if tree.exists():
            if self._wrong(files, copied, tree):
                for directory in _directories(tree):
                    directory.chmod(0o755)
                self._link(files, copied, tree)  # a blob was replaced by a repair, or a link by a copy
        else:
            self._stage(files, copied, tree)
        for directory in _directories(tree):
            directory.chmod(self._directory_mode)
        durable.sync_directory(tree.parent)

    def hide(self, manifest: str, paths: Iterable[str]) -> None:
        """Remove damaged files, given by their places, from the tree. The next `build` brings them back."""
        self._hide(self._layout.tree(manifest), paths)

    def wrong(self, manifest: Manifest) -> dict[str, bool]:
        """The paths of the tree that are wrong; True where another file is there.

        A link to the blob is right, too, where a copy should be: a publish may have stopped before it made
        the copy. The next one makes it.
        """
        return self._wrong(placed(manifest), (), self._layout.tree(manifest.id))

    def remove(self, manifest: str) -> None:
        """Rename the tree to the trash, then delete it. Processes keep the files that they have open."""
        tree, trash = self._layout.tree(manifest), self._layout.trash / manifest
        durable.remove_tree(trash)
        with suppress(FileNotFoundError):
            tree.chmod(0o755)  # renaming a directory changes its '..'
            durable.take_away(tree, trash)
            durable.sync_directory(tree.parent)
        durable.remove_tree(trash)


class HubView(_View):
    """The Hub view: a folder for each repository, `hub/models--org--name`, with a directory for each commit.

    Snapshots of one commit under different names or patterns share its directory. It shows all their files.
    The new name of a renamed repository is an alias: a link to the folder of the old name. A snapshot of the
    new name replaces it by a folder.
    """

    def build(self, folder: str, commit: str, shown: Shown) -> None:
        """Show the files of all snapshots of this commit durably. Branches are set by `point`."""
        repo = self._layout.hub / folder
        if repo.is_symlink():
            durable.remove(repo)
        (repo / "snapshots").mkdir(parents=True, exist_ok=True)
        target = self._layout.commit(folder, commit)
        if target.exists():
            self._link(shown.files, shown.copied, target)
        else:
            self._stage(shown.files, shown.copied, target)
        durable.sync_directory(target.parent)
        (repo / "trees").mkdir(exist_ok=True)
        durable.write_file(repo / "trees" / f"{commit}.json", _tree_document(shown.files))
        self._make_places(folder, commit, shown.absent)
        durable.sync_directory(repo)
        durable.sync_directory(self._layout.hub)

    def alias(self, alias: str, folder: str) -> None:
        """Let another name lead to a folder, durably, unless a folder has that name."""
        link = self._layout.hub / alias
        if alias == folder or (os.path.lexists(link) and not link.is_symlink()):
            return
        staged = self._layout.staging / f"{alias}.link"
        durable.make_link(staged, folder)
        hub_places.make_locks(self._layout.hub, alias)
        durable.move(staged, link)
        durable.sync_directory(self._layout.hub)

    def hide(self, folder: str, commit: str, paths: Iterable[str]) -> None:
        """Remove damaged files from a commit's directory. The next `build` brings them back."""
        if not self._is_alias(folder):
            self._hide(self._layout.commit(folder, commit), paths)

    def wrong(self, folder: str, manifest: Manifest) -> dict[str, bool]:
        """The paths of a snapshot that are wrong in its commit, as `PlainView.wrong` finds them."""
        files = {f.path: f for f in manifest.files}
        return self._wrong(files, (), self._layout.commit(folder, commit_of(manifest)))

    def show_links(self, folder: str, commit: str, files: Mapping[str, File]) -> None:
        """Replace the copies of these files by links, because only a snapshot that goes needs copies."""
        if files and not self._is_alias(folder):
            self._link(files, (), self._layout.commit(folder, commit))

    def repair(self, folder: str, commit: str, shown: Shown) -> None:
        """Restore the modes of a folder, the list of a commit's files if it lacks some, and what clients look
        for beside the files. A folder of an older version has nothing of the latter.
        """
        repo = self._layout.hub / folder
        for directory in (repo, repo / "snapshots", repo / "trees", *_directories(repo / "refs")):
            durable.keep_mode(str(directory), self._directory_mode)
        listing = repo / "trees" / f"{commit}.json"
        if not _lists(listing, shown.files):
            durable.make_directories(listing.parent)
            durable.write_file(listing, _tree_document(shown.files))
            log.warning("Hub list of files restored", folder=folder, commit=commit)
        try:
            self._make_places(folder, commit, shown.absent)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("disk full: what clients look for beside the files not restored", folder=folder)

    def _make_places(self, folder: str, commit: str, absent: Collection[str]) -> None:
        hub_places.make_empty(self._layout.hub, folder)
        hub_places.mark_absent(
            self._layout.hub / folder, commit, absent, beside=self._layout.staging / "link"
        )

    def point(self, folder: str, branches: Mapping[str, str]) -> None:
        """Make these branches and tags name these commits, and remove all others of the folder."""
        if self._is_alias(folder):
            return
        refs = f"{self._layout.hub}/{folder}/refs"  # as text: faster, and a start does this for every folder
        for at, _, names in os.walk(refs, topdown=False):
            for name in names:
                if f"{at}/{name}".removeprefix(f"{refs}/") not in branches:
                    durable.remove(Path(at, name))
            if at != refs and not os.listdir(at):
                os.rmdir(at)
        for revision, commit in branches.items():
            if not _names_commit(f"{refs}/{revision}", commit):
                ref = Path(refs, revision)
                try:
                    durable.make_directories(ref.parent)
                    durable.write_file(ref, commit.encode())  # no newline: huggingface_hub does not strip it
                except OSError as error:
                    if error.errno in durable.FULL:
                        durable.remove(ref)  # better no branch than one with an old commit
                    raise

    def main(self, folder: str) -> str | None:
        """The commit that the branch `main` names; None if there is none or it cannot be read now."""
        with suppress(OSError, ValueError, Leased):
            return durable.read_file(f"{self._layout.hub}/{folder}/refs/main", at_most=100).decode()
        return None

    def narrow(self, folder: str, commit: str, gone: Iterable[str], left: Mapping[str, File]) -> None:
        """Remove the paths in `gone` but not in `left` from a commit; all of it if `left` is empty."""
        if self._is_alias(folder):
            return
        repo = self._layout.hub / folder
        target, listing = repo / "snapshots" / commit, repo / "trees" / f"{commit}.json"
        if left:
            try:
                durable.write_file(listing, _tree_document(left))
            except OSError as error:
                if error.errno not in durable.FULL:
                    raise
                durable.remove(listing)  # without a list, a client uses the files that it finds
            for path in gone:
                if path not in left:
                    durable.remove(target / path)
            return
        durable.remove(listing)
        hub_places.remove_marks(repo, commit)
        trash = self._layout.trash / f"{folder}@{commit}"
        durable.remove_tree(trash)
        with suppress(FileNotFoundError):
            durable.take_away(target, trash)
            durable.sync_directory(target.parent)
        durable.remove_tree(trash)
        if not any((repo / "snapshots").glob("*")):
            durable.remove_tree(repo)
            hub_places.remove_locks(self._layout.hub, folder)
            for alias in self._layout.hub.iterdir():
                if alias.is_symlink() and os.readlink(alias) == folder:
                    durable.remove(alias)
                    hub_places.remove_locks(self._layout.hub, alias.name)

    def _is_alias(self, folder: str) -> bool:
        return os.path.islink(f"{self._layout.hub}/{folder}")


def _is_link_to(blob: str, place: str) -> bool:
    try:
        status = os.lstat(place)
        if not os.path.samestat(status, os.lstat(blob)):
            return False
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    durable.keep_mode(place, durable.SEALED, status)
    return True


def placed(manifest: Manifest) -> dict[str, File]:
    """The files of a manifest by their paths in the plain view."""
    return {manifest.place_of(f.path): f for f in manifest.files}


def directories_of(paths: Iterable[str]) -> list[str]:
    """The directories of a model that lead to these files, relative to the model's own, which is ""."""
    found = {""}
    for parent in {os.path.dirname(path) for path in paths}:
        while parent not in found:
            found.add(parent)
            parent = os.path.dirname(parent)
    return sorted(found)


def _lists(listing: Path, files: Mapping[str, File]) -> bool:
    """Whether a list of files has all of these; True while it is leased. Makes it readable by everybody."""
    try:
        durable.keep_mode(str(listing), 0o644)
        listed = durable.read_document(listing)["files"]
        return all(listed.get(path) == _tree_entry(file) for path, file in files.items())
    except Leased:
        return True  # pods that can lease it cannot write to it: their mount is read-only
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _names_commit(ref: str, commit: str) -> bool:
    """Whether a branch file has this commit. False if it cannot be read now: the caller replaces it then."""
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
        "blob_id": lfs_pointer_id(digest.hex, file.size),
        "lfs_sha256": digest.hex,
        "lfs_size": file.size,
    }
