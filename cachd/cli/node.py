"""Finds the daemon of this node, and a token for it, where its own options say they are.

So `kubectl exec ds/cachd -- cachd unpin x` works in the pod of the daemon, and `sudo cachd unpin x` on a bare
machine. A token that was found in this way goes to the daemon of this node and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cachd import files
from cachd.errors import CachdError
from cachd.kernel.listening import listening_users

if TYPE_CHECKING:
    from cachd.model.listener import Listener

DEFAULT = "http://127.0.0.1:8470"
_CONFIG, _ROOT = Path("/etc/cachd/config.yaml"), Path("/var/lib/cachd")
_KEYS = ("listen", "root", "token_file", "tls_cert_file")
_LONGEST_KEPT = 2 << 20
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 these are looked up, not bound


@dataclass(frozen=True, slots=True)
class FoundDaemon:
    """Where the daemon of this node answers.

    `token`: one that it accepts, None if none was found. `certificate`: the PEM file of its certificate, for
    an https:// address. `fault`: what is wrong with its configuration file, so that the address may be
    another; empty if nothing is.
    """

    server: str = DEFAULT
    token: str | None = None
    certificate: Path | None = None
    fault: str = ""


def found_daemon(config_file: Path | None = None) -> FoundDaemon:
    """The daemon of this node, by the environment and the configuration file; else the default address.

    While the file is not YAML, by the last good configuration, which such a daemon uses.
    """
    settings, fault = _settings(config_file)
    if not settings:
        return FoundDaemon(fault=fault)
    certificate = _path(settings.get("tls_cert_file"))
    server = _server(settings.get("listen"), has_tls=certificate is not None) or DEFAULT
    is_tls = server.startswith("https")
    file = _path(settings.get("token_file"))
    token = _token(file) if file and (is_tls or _is_trusted(server, settings)) else None
    return FoundDaemon(server, token, certificate if is_tls else None, fault)


def _settings(config_file: Path | None) -> tuple[Mapping[str, object], str]:
    """The unparsed options of the daemon that say how to reach it, as far as they are set and readable.

    And what is wrong with its file; empty if nothing is.
    """
    named = str(config_file or os.environ.get("CACHD_CONFIG", "")).strip()
    file = Path(named) if named else _CONFIG
    has_file = bool(named) or os.access(file, os.R_OK)
    if not has_file and not any(os.environ.get(f"CACHD_{key.upper()}") for key in _KEYS):
        return {}, ""
    from cachd.settings import file as configfile  # YAML takes longer to load than most commands to run
    from cachd.settings.given import given

    read = configfile.examine(file) if has_file else None
    fault = str(read.findings[0]) if read and read.findings else ""
    if read and fault:
        read.keys |= _last_good(read.keys)
    found = given(dict.fromkeys(_KEYS, ()), {}, read).values()
    return {key: found[key] for key in _KEYS if key in found}, fault


def _last_good(keys: Mapping[str, object]) -> dict[str, object]:
    """What the daemon kept of its last good configuration; empty if this user may not read it."""
    from cachd.store.layout import Layout
    from cachd.store.root import own_place

    root = _path(os.environ.get("CACHD_ROOT")) or _path(keys.get("root")) or _ROOT
    for place in (root, own_place(root)):
        with suppress(*files.UNREADABLE, TypeError, KeyError):
            kept = dict(files.document(Layout(place).last_good, at_most=_LONGEST_KEPT)["keys"])
            return {key: kept[key] for key in _KEYS if key in kept}
    return {}


def _server(listen: object, *, has_tls: bool) -> str | None:
    """The address of one of the daemon's listeners, without TLS if possible; None if none is known."""
    from cachd.model.listener import Listener, Serves
    from cachd.settings.types import listens

    texts = listens(listen) if listen is not None else None
    found = []
    for text in texts if isinstance(texts, list) else ():
        with suppress(CachdError):
            found.append(Listener.parse(str(text)))
    addresses = [_address(each, has_tls=has_tls) for each in found if each.serves is Serves.everything]
    return min(filter(None, addresses), key=lambda address: address.startswith("https"), default=None)


def _address(listener: Listener, *, has_tls: bool) -> str | None:
    from cachd.model.listener import SocketFile

    if isinstance(listener.at, SocketFile):
        return str(listener.at) if os.access(listener.at.path, os.W_OK) else None
    if not listener.at.port:
        return None  # the kernel chose the port
    host = _EVERY_ADDRESS.get(listener.at.host, listener.at.host)
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if has_tls and listener.may_speak_tls else "http"
    return f"{scheme}://{host}:{listener.at.port}"


def _is_trusted(server: str, settings: Mapping[str, object]) -> bool:
    """Whether only root, this user or the owner of the cache listens there.

    Otherwise another user of the machine took the port while the daemon was down, and must not get the token.
    """
    if server.startswith("unix:"):
        return True  # only the daemon may write to its directory
    trusted = {0, os.geteuid()}
    root = _path(settings.get("root")) or _ROOT
    with suppress(OSError):
        trusted.add(root.stat().st_uid)
    return listening_users(urlsplit(server).port or 0) <= trusted


def _token(file: Path) -> str | None:
    from cachd.settings.own_token import own_token

    return own_token(file)


def _path(value: object) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None
