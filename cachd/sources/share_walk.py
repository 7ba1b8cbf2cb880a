"""Lists the files below a directory of a shared volume, as people and their tools leave them there.

Links are followed while they stay under an allowed prefix. What tools keep beside a model is left out (see
`is_left_out`), and so are the directories behind the links of a Kubernetes volume:

    config.json -> ..data/config.json         listed
    ..data -> ..2026_01_31_10_00_00.123       left out, since a kubelet swaps it
    ..2026_01_31_10_00_00.123/config.json     left out

An entry that cannot be read, cannot be a file of a model, or belongs to a download that has not ended is
`Unusable`: a request may exclude it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cachd.errors import Forbidden, Invalid, NotFound
from cachd.model import Entries, Unusable, check_path
from cachd.model.leftovers import is_left_out, not_ended, unfinished
from cachd.sources import beneath

_ATOMIC = "..data"  # the link of a kubelet's atomic writer, whose names all begin with '..'


@dataclass(frozen=True, slots=True)
class Found:
    """A file. `shown`: its path in the model; `path`: its path on the volume; `real`: that without links."""

    shown: str
    path: Path
    real: Path
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory to list. `above`: the directories above it, by their paths without links."""

    shown: str
    path: Path
    real: Path
    above: frozenset[Path]


class Walk:
    """Lists one directory and all below it. `check` returns a path with its links resolved, or refuses it."""

    def __init__(self, top: Path, check: Callable[[Path], Path], max_files: int) -> None:
        self._top, self._check = top, check
        self._entries = Entries(str(top), max_files)
        self._folders: list[_Folder] = []

    def found(self) -> Iterator[Found | Unusable | None]:
        """Yields what is there, and None for each directory. Raises Invalid if there is too much."""
        self._folders = [_Folder("", self._top, self._check(self._top), frozenset())]
        while self._folders:
            folder = self._folders.pop()
            yield None
            try:
                entries = self._listed(folder)
            except (PermissionError, NotADirectoryError) as error:
                if not folder.shown:
                    raise
                yield Unusable(folder.shown, unreadable(folder.path, error))
                continue
            below = []
            for name, is_link in entries:
                found = self._one(folder, name, is_link=is_link)
                if isinstance(found, _Folder):
                    below.append(found)
                else:
                    yield found
            self._folders.extend(reversed(below))

    def _listed(self, folder: _Folder) -> list[tuple[str, bool]]:
        """The names in a directory that are not left out, in order, and whether each is a link."""
        descriptor = beneath.open_directory(folder.real)
        try:
            listed = []
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    self._entries.add(f"{folder.path}/{entry.name}")
                    listed.append((entry.name, entry.is_symlink()))
        finally:
            os.close(descriptor)
        if any(name == _ATOMIC and is_link for name, is_link in listed):
            listed = [each for each in listed if not each[0].startswith("..")]
        return sorted(
            each for each in listed if unfinished(each[0]) or not is_left_out(f"{folder.shown}{each[0]}")
        )

    def _one(self, folder: _Folder, name: str, *, is_link: bool) -> Found | Unusable | _Folder:
        shown, path = f"{folder.shown}{name}", folder.path / name
        try:
            if begun := unfinished(name):
                return Unusable(f"{folder.shown}{begun}", not_ended(path))
            check_path(name)  # first: a name that is not UTF-8 is in no URL that could be checked
            real = self._check(path) if is_link else folder.real / name
            status = os.lstat(real)
            if not stat.S_ISDIR(status.st_mode):
                return Found(check_path(shown), path, real, regular(path, status))
            if real in {*folder.above, folder.real}:
                raise loops(path)
            return _Folder(f"{shown}/", path, real, folder.above | {folder.real})
        except (Invalid, Forbidden) as error:
            return Unusable(shown, error)
        except FileNotFoundError:
            return Unusable(shown, _missing(path, is_link=is_link))
        except PermissionError as error:
            return Unusable(shown, unreadable(path, error))
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return Unusable(shown, loops(path))


def regular(path: Path, status: os.stat_result) -> os.stat_result:
    """The status, if it is that of a regular file. Raises Invalid."""
    if not stat.S_ISREG(status.st_mode):
        raise Invalid(
            f"{path} is neither a file nor a directory",
            code="unsafe_path",
            hint="remove it, or exclude it by a pattern",
        )
    return status


def loops(path: Path) -> Invalid:
    """The error for a link that leads to itself, or to a directory that contains it."""
    return Invalid(
        f"{path} is a link that leads back to itself or to a directory above it",
        code="unsafe_path",
        hint="remove it, or exclude it by a pattern",
    )


def _missing(path: Path, *, is_link: bool) -> NotFound:
    if is_link:
        return NotFound(
            f"{path} is a link, and nothing is where it leads",
            code="file_not_found",
            hint="copy the model to the shared volume again, or exclude the link by a pattern",
        )
    return NotFound(
        f"{path} vanished while the directory was listed",
        code="file_not_found",
        hint="retry when nobody writes to the model",
    )


def unreadable(path: Path, error: OSError) -> Forbidden:
    """The error for a file or a directory that this user may not read."""
    return Forbidden(
        f"cachd may not read {path}: {error.strerror}",
        code="source_forbidden",
        hint="check its mode and owner, or exclude it by a pattern",
    )
