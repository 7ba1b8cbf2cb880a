"""Reads one value of the option `listen`: an address of the API, then words that restrict it.

127.0.0.1:8470
[::]:8470
0.0.0.0:8471 probes plain
unix:/run/cachd/cachd.sock mode=0660 group=1000
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from cachd.errors import Invalid

_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_UNIX = "unix:"
_GROUP = re.compile(r"[A-Za-z0-9._-]{1,32}")
_LONGEST_PATH = 107  # bytes: sun_path has 108, the last is zero (unix(7))
_MODE = 0o660
_ADDRESSES = "write HOST:PORT, such as 127.0.0.1:8470 or [::]:8470, or unix:/PATH"
_WORDS = "write read-only, probes or plain after an address, and mode=0660 or group=GROUP after unix:/PATH"


class Serves(Enum):
    """The requests that a listener answers."""

    everything = "everything"
    reads = "read-only"
    probes = "probes"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A unix socket. Whoever may write to its file may connect: `mode`, and `group` (name or number)."""

    path: str
    mode: int = _MODE
    group: str | None = None

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}"

    @property
    def is_local(self) -> bool:
        """True: only processes of this node can connect."""
        return True


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the API listens, what it answers there, and whether it speaks no TLS there (`is_plain`)."""

    at: Address | SocketFile
    serves: Serves = Serves.everything
    is_plain: bool = False

    def __str__(self) -> str:
        return str(self.at)

    @property
    def may_speak_tls(self) -> bool:
        """Whether the daemon speaks TLS here once it has a certificate."""
        return isinstance(self.at, Address) and not self.is_plain

    @classmethod
    def parse(cls, text: str) -> Listener:
        """Read one value of `listen`. Raises Invalid."""
        address, *words = text.split()[:8] or [""]
        if address.startswith(_UNIX):
            words, mode, group = _modes(words)
            return cls(
                _socket_file(address.removeprefix(_UNIX), mode, group), _serves(words), "plain" in words
            )
        found = _ADDRESS.fullmatch(address)
        if not found or int(found[1]) > 65535:
            raise Invalid(_ADDRESSES)
        return cls(
            Address(urlsplit(f"//{address}").hostname or "", int(found[1])), _serves(words), "plain" in words
        )


def _serves(words: list[str]) -> Serves:
    found = [Serves(word) for word in words if word in (Serves.reads.value, Serves.probes.value)]
    unknown = [word for word in words if word != "plain" and word not in {each.value for each in found}]
    if unknown or len(found) > 1:
        raise Invalid(f"{' '.join(unknown or words)!r} is not understood: {_WORDS}")
    return found[0] if found else Serves.everything


def _modes(words: list[str]) -> tuple[list[str], int, str | None]:
    """The words that are neither mode nor group, then the mode, then the group."""
    found = dict(word.split("=", 1) for word in words if word.startswith(("mode=", "group=")))
    mode, group = found.get("mode", f"{_MODE:04o}"), found.get("group")
    if not re.fullmatch(r"0?[0-7]{3}", mode) or (group is not None and not _GROUP.fullmatch(group)):
        raise Invalid(f"mode must be three octal digits, and group a name or a number: {_WORDS}")
    return [word for word in words if word.partition("=")[0] not in ("mode", "group")], int(mode, 8), group


def _socket_file(path: str, mode: int, group: str | None) -> SocketFile:
    if not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise Invalid("the path of a unix socket must be absolute: unix:/run/cachd/cachd.sock")
    if len(path.encode(errors="replace")) > _LONGEST_PATH:
        raise Invalid(f"the path of a unix socket may have at most {_LONGEST_PATH} bytes")
    return SocketFile(path, mode, group)
