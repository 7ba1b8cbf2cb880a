"""Decides whether a daemon's address is of this node, and lets this process become the daemon's user."""

from __future__ import annotations

import os
import pwd
import socket
from urllib.parse import urlsplit

_UNIX = "unix:"


def is_here(server: str) -> bool:
    """Whether the address of a daemon is one of this node: a Unix socket, or an address it can bind to."""
    if server.startswith(_UNIX):
        return True
    try:
        host = urlsplit(server).hostname or ""
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return False
    return any(_can_bind(family, address) for family, _, _, _, address in found)


def _can_bind(family: int, address: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def can_become(uid: int, gid: int) -> bool:
    """Whether `become` leaves a process that works: it is root's now, and the user may read Python and cachd.

    Some of their modules are imported only later.
    """
    if os.geteuid() != 0 or uid == 0:
        return False
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return all(os.access(file, os.R_OK, effective_ids=True) for file in (os.__file__, __file__))
    finally:
        os.seteuid(0)
        os.setegid(0)


def become(uid: int, gid: int) -> None:
    """Give up the rights of root for those of another user, for good. Raises OSError.

    Then this process sees files as the daemon of that user does.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        os.setgroups([])
    else:
        os.initgroups(entry.pw_name, gid)
        os.environ["HOME"] = entry.pw_dir  # where the logins of `hf` and of AWS are
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
