"""Processes that are killed at any step, as a user without rights."""

from __future__ import annotations

import itertools
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ground.users import as_another_user


@contextmanager
def base_as_another_user() -> Iterator[Path]:
    """An empty root for killed_at_every_step, as a user without rights: root ignores the modes of files."""
    with as_another_user() as place:
        base = place / "root"
        base.mkdir()
        yield base


KILLED = 99
CHANGING: tuple[str, ...] = ("mkdir", "rmdir", "rename", "link", "symlink", "unlink", "chmod", "fchmod")
CHANGING += ("write", "pwrite", "ftruncate", "posix_fallocate")


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a child process that does the work: 0, or 1 after an exception."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 the parent sees the status, the test's output the reason
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_after(calls: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work of a process that is killed right after its so-manieth system call that changes a disk."""
    left = itertools.count(calls, -1)

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **kwargs: object) -> object:
            result = call(*args, **kwargs)
            if not next(left):
                os._exit(KILLED)
            return result

        return called

    def run() -> object:
        opened = os.open
        created = deadly(opened)
        for name in CHANGING:
            setattr(os, name, deadly(getattr(os, name)))
        os.open = lambda path, flags, *rest, **by: (  # type: ignore[assignment]  # as `open` is called
            (created if flags & os.O_CREAT else opened)(path, flags, *rest, **by)
        )
        return work()

    return run


def killed_at_every_step(base: Path, work: Callable[[Path], object]) -> Iterator[Path]:
    """Copies of a closed root, each left by a process that was killed one step later; the last by one that
    did all of its work."""
    for calls in itertools.count():
        root = base.with_name(f"{base.name}-{calls}")
        subprocess.run(["cp", "-a", base, root], check=True)
        status = in_child(dying_after(calls, lambda root=root: work(root)))
        assert status in (0, KILLED)
        yield root
        if status == 0:
            assert calls > 3, "it was killed at least three times"
            return
