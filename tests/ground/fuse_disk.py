"""A file system in user space over a directory: it passes every call on, fails those it was told to, and
writes down what changes and what is synced.

    python -m tests.ground.fuse_disk BACKING MOUNT_POINT RULES LOG      what `disks.FuseDisk` runs

RULES is a JSON list, read again when it changes; a rule fails or delays the calls of one operation:

    {"operation": "fsync", "match": "*/data", "error": "EIO", "skip": 2, "times": 1, "delay": 0.1}

A call with "until" makes a file of that name and `.met`, and waits until the file itself exists. The
operation "renumber" gives a file another inode number at each look.

LOG is a sequence of pickled records, one a change, in the order they took effect. A file or directory is a
number in them, given when it is made; the root is 0.

    ("create", number, parent, name, mode)   ("directory_made", number, parent, name, mode)
    ("symlink", number, parent, name, target)   ("link", number, parent, name)
    ("unlink", parent, name)   ("rename", parent, name, new_parent, new_name)
    ("write", number, offset, content)   ("truncate", number, size)   ("mode", number, mode)
    ("sync", number)   ("sync_directory", number)

There are no leases.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import json
import os
import pickle
import stat
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mfusepy

_STATUS = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
_TIMES = ("st_atime", "st_mtime", "st_ctime")
_FILE_SYSTEM = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail")


class Disk(mfusepy.Operations):
    use_ns = True

    def __init__(self, backing: str, rules: str, log: str) -> None:
        self._backing, self._rules_file = backing, rules
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._lock = threading.Lock()
        self._numbers = {os.stat(backing).st_ino: 0}
        self._next = itertools.count(1)
        self._rules: tuple[int, list[dict[str, Any]]] = (0, [])
        self._met: Counter[str] = Counter()
        self._numbered = itertools.count(1 << 20)

    def init(self, path: str) -> None:
        print("mounted", flush=True)

    # --- faults ---

    def _meet(self, operation: str, path: str) -> None:
        """Fail or wait if a rule says so. Raises OSError."""
        for rule in self._rules_now():
            if rule["operation"] != operation or not fnmatch.fnmatch(path, rule.get("match", "*")):
                continue
            with self._lock:
                self._met[rule["id"]] += 1
                met = self._met[rule["id"]] - rule.get("skip", 0)
            if met < 1 or met > rule.get("times", met):
                continue
            time.sleep(rule.get("delay", 0))
            if "until" in rule:
                Path(f"{rule['until']}.met").touch()
                while not os.path.exists(rule["until"]):
                    time.sleep(0.01)
            if "error" in rule:
                raise OSError(getattr(errno, rule["error"]), "told to")

    def _rules_now(self) -> list[dict[str, Any]]:
        changed = os.stat(self._rules_file).st_mtime_ns
        if self._rules[0] != changed:
            self._rules = changed, json.loads(Path(self._rules_file).read_text())
        return self._rules[1]

    # --- the record ---

    def _record(self, *record: object) -> None:
        os.write(self._log, pickle.dumps(record))

    def _number(self, path: str) -> int:
        return self._number_of(os.lstat(self._at(path)))

    def _number_of(self, status: os.stat_result) -> int:
        """The number of a file; a new one for a file that another mount of the same directory made."""
        if status.st_ino not in self._numbers:
            self._numbers[status.st_ino] = next(self._next)
        return self._numbers[status.st_ino]

    def _new(self, path: str) -> int:
        """Number what was just made: its inode may be one that was there before."""
        number = next(self._next)
        self._numbers[os.lstat(self._at(path)).st_ino] = number
        return number

    def _place(self, path: str) -> tuple[int, str]:
        parent, name = os.path.split(path)
        return self._number(parent), name

    def _at(self, path: str) -> str:
        return self._backing + path

    # --- what changes names ---

    def create(self, path: str, mode: int, fi: object = None) -> int:
        self._meet("create", path)
        with self._lock:
            fd = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            self._record("create", self._new(path), *self._place(path), mode)
        return fd

    def mkdir(self, path: str, mode: int) -> None:
        self._meet("mkdir", path)
        with self._lock:
            os.mkdir(self._at(path), mode)
            self._record("directory_made", self._new(path), *self._place(path), mode)

    def symlink(self, target: str, source: str) -> None:
        self._meet("symlink", target)
        with self._lock:
            os.symlink(source, self._at(target))
            self._record("symlink", self._new(target), *self._place(target), source)

    def link(self, target: str, source: str) -> None:
        self._meet("link", target)
        with self._lock:
            os.link(self._at(source), self._at(target), follow_symlinks=False)
            self._record("link", self._number(source), *self._place(target))

    def unlink(self, path: str) -> None:
        self._meet("unlink", path)
        with self._lock:
            os.unlink(self._at(path))
            self._record("unlink", *self._place(path))

    def rmdir(self, path: str) -> None:
        self._meet("rmdir", path)
        with self._lock:
            os.rmdir(self._at(path))
            self._record("unlink", *self._place(path))

    def rename(self, old: str, new: str) -> None:
        self._meet("rename", old)
        self._meet("rename_to", new)
        with self._lock:
            os.rename(self._at(old), self._at(new))
            self._record("rename", *self._place(old), *self._place(new))

    # --- what changes a file ---

    def open(self, path: str, flags: int) -> int:
        self._meet("open", path)
        with self._lock:
            fd = os.open(self._at(path), flags & ~os.O_APPEND)  # the kernel tells where to append
            if flags & os.O_TRUNC:
                self._record("truncate", self._number(path), 0)
        return fd

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._meet("write", path)
        with self._lock:
            written = os.pwrite(fh, data, offset)
            self._record("write", self._number_of(os.fstat(fh)), offset, bytes(data[:written]))
        return written

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        self._meet("truncate", path)
        with self._lock:
            os.truncate(self._at(path), length)
            self._record("truncate", self._number(path), length)

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> None:
        self._meet("fallocate", path)
        with self._lock:
            os.posix_fallocate(fh, offset, size)
            self._record("truncate", self._number_of(os.fstat(fh)), os.fstat(fh).st_size)

    def chmod(self, path: str, mode: int) -> None:
        self._meet("chmod", path)
        with self._lock:
            os.chmod(self._at(path), mode)
            self._record("mode", self._number(path), stat.S_IMODE(mode))

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._meet("fsync", path)
        with self._lock:
            self._record("sync", self._number_of(os.fstat(fh)))

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        self._meet("fsyncdir", path)
        with self._lock:
            self._record("sync_directory", self._number(path))

    # --- what changes nothing ---

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        status = os.lstat(self._at(path))
        times = {name: getattr(status, f"{name}_ns") for name in _TIMES}
        number = {"st_ino": next(self._numbered)} if self._renumbers() else {}
        return {name: getattr(status, name) for name in _STATUS} | times | number

    def _renumbers(self) -> bool:
        """Whether each look at a file shows another inode number, as of mounts that remember none."""
        return any(each["operation"] == "renumber" and each.get("times", 1) for each in self._rules_now())

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._meet("read", path)
        return os.pread(fh, size, offset)

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        self._meet("readdir", path)
        names = [".", "..", *os.listdir(self._at(path))]
        return [(name, self.getattr(os.path.join(path, name)), 0) for name in names]

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self._at(path), uid, gid)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._at(path), ns=times or (time.time_ns(),) * 2)

    def statfs(self, path: str) -> dict[str, int]:
        self._meet("statfs", path)
        status = os.statvfs(self._at(path))
        return {name: getattr(status, name) for name in _FILE_SYSTEM} | {"f_namemax": status.f_namemax}

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


if __name__ == "__main__":
    backing, mount_point, rules, log = sys.argv[1:]
    # Nothing is remembered by the kernel: what a test does below the mount point is seen at once.
    remembered = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    options = {"use_ino": True, "hard_remove": True, "allow_other": True}
    mfusepy.FUSE(
        Disk(os.path.abspath(backing), rules, log), mount_point, foreground=True, **remembered, **options
    )
