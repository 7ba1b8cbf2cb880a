"""The sockets that the API listens at: opened together, closed together."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cachd import files
from cachd.errors import Unavailable
from cachd.model.listener import Address, Listener, SocketFile

BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Opened:
    """A listener with its socket."""

    listener: Listener
    sock: socket.socket

    def place(self) -> dict[str, object]:
        """Where it really listens, for the log: port 0 is none."""
        if isinstance(self.listener.at, SocketFile):
            return {"path": self.listener.at.path}
        host, port = self.sock.getsockname()[:2]
        return {"host": host, "port": port}


@contextmanager
def opened(listeners: Iterable[Listener]) -> Iterator[list[Opened]]:
    """All sockets, in the order given. Raises Unavailable when one cannot be had; then none stays."""
    with ExitStack() as stack:
        yield [Opened(each, stack.enter_context(_opened(each.at))) for each in listeners]


@contextmanager
def _opened(at: Address | SocketFile) -> Iterator[socket.socket]:
    try:
        sock = _tcp(at) if isinstance(at, Address) else _unix(at)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {at}: {files.reason(error)}",
            code="cannot_listen",
            hint="is another daemon there? choose another --listen",
        ) from error
    with sock:
        mark = _mark(at)
        try:
            yield sock
        finally:
            if isinstance(at, SocketFile) and mark == _mark(at):
                with suppress(OSError):
                    Path(at.path).unlink()


def _tcp(at: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
    sock = socket.create_server((at.host, at.port), family=family, backlog=BACKLOG)
    # Inherited by what is accepted: a head and a body sent apart must not wait for an acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _unix(at: SocketFile) -> socket.socket:
    """A socket whose file lets nobody but its owner connect before its group and mode are right."""
    gid = _gid(at.group) if at.group else -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone_in(Path(at.path).parent):
            _remove_stale(at.path)
            sock.bind(at.path)  # 0755 by the umask: to connect takes leave to write
            _open_up(at.path, gid, at.mode)
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_up(path: str, gid: int, mode: int) -> None:
    """Change group and mode of a socket file, and of nothing that was put in its place."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise FileExistsError(errno.EEXIST, "another file is there", path)
        same = f"/proc/self/fd/{found}"
        os.chown(same, -1, gid)
        Path(same).chmod(mode)
    finally:
        os.close(found)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Two daemons that start at once do not take each other's file for a stale one: it refuses to connect,
    too, until it listens."""
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a daemon that died. Raises OSError when it is another's, or no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "another file is there", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)  # a full queue of one that lives answers at once, too
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "somebody listens there", path)


def _gid(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"no group is named {group}") from None


def _mark(at: Address | SocketFile) -> tuple[int, int] | None:
    """Which file it is, to remove no other in the end."""
    if isinstance(at, Address):
        return None
    try:
        status = os.lstat(at.path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
