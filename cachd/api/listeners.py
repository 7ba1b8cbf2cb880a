"""Opens and closes the sockets on which the API listens."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cachd import files
from cachd.errors import CachdError, Forbidden, InUse, Invalid
from cachd.model.listener import Address, Listener, SocketFile

BACKLOG = 1024
_TAKEN_AGAIN_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Opened:
    """A listener and its open socket."""

    listener: Listener
    sock: socket.socket

    def place(self) -> dict[str, object]:
        """The address it is bound to, for the log. With port 0, the kernel chose the port."""
        if isinstance(self.listener.at, SocketFile):
            return {"path": self.listener.at.path}
        host, port = self.sock.getsockname()[:2]
        return {"host": host, "port": port}


class Sockets:
    """The sockets of all listeners. Its exit closes them."""

    def __init__(self, listeners: Iterable[Listener], clock: Callable[[], float] = time.monotonic) -> None:
        self._listeners, self._clock = list(listeners), clock
        self._open: dict[int, Opened] = {}  # by the number of the listener
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open_free(self) -> list[Opened]:
        """Open the sockets whose address nobody else uses now. Raises Forbidden or Invalid."""
        for number in range(len(self._listeners)):
            with suppress(InUse):
                self._get(number)
        return list(self._open.values())

    def open_all(self, *, patience_seconds: float = 0.0) -> list[Opened]:
        """All sockets in the given order. An address that is in use is tried again for `patience_seconds`.

        Raises InUse, Forbidden or Invalid.
        """
        deadline = self._clock() + patience_seconds
        while True:
            try:
                return [self._get(number) for number in range(len(self._listeners))]
            except InUse:
                if self._clock() > deadline:
                    raise
            time.sleep(_TAKEN_AGAIN_SECONDS)

    def _get(self, number: int) -> Opened:
        if number not in self._open:
            listener = self._listeners[number]
            self._open[number] = Opened(listener, self._stack.enter_context(_opened(listener.at)))
        return self._open[number]


@contextmanager
def _opened(at: Address | SocketFile) -> Iterator[socket.socket]:
    try:
        sock = _tcp(at) if isinstance(at, Address) else _unix(at)
    except OSError as error:
        raise _refused(at, error) from error
    with sock:
        identity = _identity(at)
        try:
            yield sock
        finally:
            if isinstance(at, SocketFile) and identity == _identity(at):
                with suppress(OSError):
                    Path(at.path).unlink()


def _refused(at: Address | SocketFile, error: OSError) -> CachdError:
    """The error for an address on which this process cannot listen."""
    kind: type[CachdError] = Invalid
    hint = "choose another --listen: an address of this machine, or a directory that exists"
    if error.errno in (errno.EADDRINUSE, errno.EAGAIN):
        kind, hint = InUse, "stop the other daemon if one runs there, or choose another --listen"
    elif error.errno in (errno.EACCES, errno.EPERM):
        kind, hint = Forbidden, "choose a port above 1023, or a directory in which this user may write"
    return kind(f"cannot listen on {at}: {files.reason(error)}", code="cannot_listen", hint=hint)


def _tcp(at: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
    sock = socket.create_server((at.host, at.port), family=family, backlog=BACKLOG)
    # Accepted sockets inherit this. Without it, Nagle's algorithm delays a body sent after its head (tcp(7)).
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _unix(at: SocketFile) -> socket.socket:
    """A unix socket. Until its group and mode are set, only the owner of its file can connect."""
    gid = _gid(at.group) if at.group else -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(Path(at.path).parent):
            _remove_stale(at.path)
            sock.bind(at.path)  # mode 0755 by the umask; connecting needs write permission (unix(7))
            _grant_access(at.path, gid, at.mode)
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _grant_access(path: str, gid: int, mode: int) -> None:
    """Set the group and mode of a socket file, never those of a file that replaced it meanwhile."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise FileExistsError(errno.EEXIST, "another file is there", path)
        opened_file = f"/proc/self/fd/{found}"
        os.chown(opened_file, -1, gid)
        Path(opened_file).chmod(mode)
    finally:
        os.close(found)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory, so that a daemon never removes the socket of another that is just starting.

    A socket that is bound but not listening yet refuses connections, just like a stale one.
    """
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a dead daemon. Raises OSError for a live socket or another kind of file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "another file is there", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        # If a live socket's queue is full, connect fails instead of waiting.
        client.settimeout(0.0)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another process listens there", path)


def _gid(group: str) -> int:
    """The id of a group given by name or number. Raises OSError."""
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"no group is named {group}") from None


def _identity(at: Address | SocketFile) -> tuple[int, int] | None:
    """Device and inode of a socket file, so that only this very file is removed at the end."""
    if isinstance(at, Address):
        return None
    try:
        status = os.lstat(at.path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
