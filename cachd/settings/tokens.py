"""Reads the tokens of the API from their file or directory, at every use.

A file has either a single token, which is an admin's, or a list:

    tokens:
      - {name: team-a, role: pull, namespaces: ["team-a-*"], token: s3cr3t}
      - {name: grafana, role: read, sha256: 9f86d081…}

In a directory, such as a mounted Secret, each file describes one token. The file's name is the token's name:

    role: pull
    namespaces: ["team-a-*", "hf://Qwen/"]
    token: s3cr3t
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Invalid, Unauthorized
from cachd.policy.roles import Grant, Namespaces, Role
from cachd.settings.file import parse

log = structlog.get_logger(__name__)

MAX_TOKENS = 1000
_LONGEST_BYTES = 256 << 10
_LONGEST_TOKEN = 4096
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RESERVED = ("anonymous",)  # the name of callers without a token
_KEYS = ("name", "role", "namespaces", "token", "sha256")
_ALONE = "admin"  # the name of the single token of a file


@dataclass(frozen=True, slots=True)
class _Token:
    """A token by its sha256. cachd does not keep the text in memory."""

    digest: bytes = field(repr=False)
    grant: Grant


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file as it was read last.

    `seen` is the sha256 of its content, or of the reason why it cannot be read. `tokens` are those in force;
    if the file has a `fault`, they are from an earlier content.
    """

    seen: bytes
    tokens: tuple[_Token, ...] = ()
    fault: str = ""


class TokenFile:
    """The tokens of a file, or of the files in a directory. Methods may be called from any thread.

    Every use reads the files again. While a file is broken, its last good tokens stay in force, and the log
    says so once. Removing or emptying a file revokes its tokens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: Mapping[str, _Entry] = {}
        self._refusal = ""

    def are_in_force(self) -> bool:
        """Whether the tokens in force are those that the files contain now. Blocks."""
        return not self._is_behind(self._read())

    def faults(self) -> list[str]:
        """What is wrong with the files now, without any token; nothing if all are in force. Blocks."""
        faults = {name: entry.fault for name, entry in self._read().items() if entry.fault}
        named = [f"{name}: {fault}" if name else fault for name, fault in faults.items()]
        return [self._refusal, *named] if self._refusal else named

    def grant_of(self, token: bytes) -> Grant | None:
        """The grant of a token; None if the token is not known. Blocks.

        Raises Unauthorized if no token is in force because the files cannot be read.
        """
        entries = self._read()
        presented, found = hashlib.sha256(token).digest(), None
        for entry in entries.values():
            for known in entry.tokens:
                if hmac.compare_digest(known.digest, presented):  # no early exit: constant time
                    found = found or known.grant
        if self._is_behind(entries) and not any(entry.tokens for entry in entries.values()):
            raise Unauthorized(
                "the daemon cannot read its token_file, so it accepts no token",
                code="token_unreadable",
                hint="make the file readable for the daemon; its log has the reason",
            )
        return found if token else None

    def _is_behind(self, entries: Mapping[str, _Entry]) -> bool:
        return bool(self._refusal) or any(entry.fault for entry in entries.values())

    def _read(self) -> Mapping[str, _Entry]:
        try:
            read = contents(self._path)
        except FileNotFoundError:
            self._refuse("there is no such file")
            self._entries = {}
            return {}
        except OSError as error:
            self._refuse(files.reason(error))
            return self._entries  # the last good tokens stay in force
        self._refusal = ""
        is_directory = "" not in read
        with self._lock:  # no disk access under the lock
            before = self._entries
            self._entries = {
                name: _entry(name, content, before.get(name), is_directory=is_directory, path=self._path)
                for name, content in read.items()
            }
            return self._entries

    def _refuse(self, reason: str) -> None:
        if reason != self._refusal:
            log.warning("token_file cannot be read", path=str(self._path), reason=reason)
        self._refusal = reason


def contents(path: Path) -> dict[str, bytes | OSError]:
    """The content of each file, or the error of reading it, by name; a single file has the name "".

    Raises OSError when the path itself cannot be read.
    """
    if not path.is_dir():
        return {"": _content(path)}
    version = path / "..data"  # the kubelet updates a mounted Secret by one rename of this link
    place = Path(os.path.realpath(version)) if version.is_symlink() else path
    names = sorted(file.name for file in place.iterdir() if not file.name.startswith("."))
    if len(names) > MAX_TOKENS:
        raise OSError(f"more than {MAX_TOKENS} files")
    found = {}
    for name in names:
        with suppress(FileNotFoundError):  # removed meanwhile
            found[name] = _content(place / name)
    if place != path and not place.is_dir():
        return contents(path)  # the Secret was updated meanwhile
    return found


def _content(path: Path) -> bytes | OSError:
    """The content, or the error of reading it. Raises FileNotFoundError."""
    try:
        return files.content(path, at_most=_LONGEST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        return error


def _entry(
    name: str, content: bytes | OSError, before: _Entry | None, *, is_directory: bool, path: Path
) -> _Entry:
    """The entry of a file with this content. `before`: its previous entry; a broken file keeps its tokens."""
    text = f"cannot be read: {files.reason(content)}".encode() if isinstance(content, OSError) else content
    seen = hashlib.sha256(text).digest()
    if before is not None and before.seen == seen:
        return before
    try:
        if isinstance(content, OSError):
            raise Invalid(text.decode())
        return _Entry(seen, _of_directory(name, content) if is_directory else _of_file(content))
    except Invalid as error:
        kept = before.tokens if before else ()
        log.warning(
            "tokens not taken over: those that were in force before stay",
            path=str(path / name if name else path),
            reason=error.detail,
            kept=[token.grant.name for token in kept],
        )
        return _Entry(seen, kept, fault=error.detail)


# --- parsing; no error shows a value, because it may be a token ---


def _of_file(content: bytes) -> tuple[_Token, ...]:
    """The tokens of a file that is not in a directory of tokens. Raises Invalid."""
    stripped = content.strip()
    if not stripped:
        return ()
    parsed = None if _is_one_word(stripped) else parse(_decoded(content))
    if parsed is None or isinstance(parsed, str):
        if b"\n" in stripped:
            raise Invalid("neither one token on one line nor a list of tokens")
        return (_Token(_digest_of(stripped), Grant(_ALONE, Role.admin)),)
    listed = parsed.get("tokens") if isinstance(parsed, dict) and set(parsed) == {"tokens"} else parsed
    if not isinstance(listed, list):
        raise Invalid("write one token on one line, or tokens: and a list")
    if len(listed) > MAX_TOKENS:
        raise Invalid(f"more than {MAX_TOKENS} tokens")
    tokens = tuple(_token(each, f"tokens[{number}]") for number, each in enumerate(listed))
    _check_unique(tokens)
    return tokens


def _of_directory(name: str, content: bytes) -> tuple[_Token, ...]:
    """The token of one file in a directory. Raises Invalid."""
    if not content.strip():
        return ()
    parsed = None if _is_one_word(content.strip()) else parse(_decoded(content))
    if not isinstance(parsed, dict):
        raise Invalid(
            "write role: and token: (or sha256:), and namespaces: unless the token is for all models"
        )
    if "name" in parsed:
        raise Invalid("leave out name: the file's name is the token's name")
    return (_token({**parsed, "name": name}, "the file"),)


def _is_one_word(content: bytes) -> bool:
    return len(content.split(None, 1)) == 1 and not content.startswith((b"{", b"["))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Invalid("not UTF-8") from None


def _token(entry: object, where: str) -> _Token:
    if not isinstance(entry, dict):
        raise Invalid(f"{where} is not a mapping with name, role and token")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise Invalid(f"{where} has {len(unknown)} unknown keys; the keys are {', '.join(_KEYS)}")
    name, role = entry.get("name"), entry.get("role")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise Invalid(f"{where} needs a name of letters, digits, '.', '_' and '-'")
    if not isinstance(role, str) or role not in Role.__members__:
        raise Invalid(f"{where} needs a role: {', '.join(Role.__members__)}")
    return _Token(_digest(entry, where), Grant(name, Role[role], _namespaces(entry, where)))


def _namespaces(entry: Mapping[str, object], where: str) -> Namespaces:
    if "namespaces" not in entry:
        return Namespaces()
    listed = entry["namespaces"]
    entries = [each.strip() for each in listed.split(",")] if isinstance(listed, str) else listed
    try:
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in entries):
            raise ValueError("is not a list")
        return Namespaces.parse(entries)
    except ValueError as error:
        raise Invalid(f"{where}: namespaces: {error}") from None


def _digest(entry: Mapping[str, object], where: str) -> bytes:
    token, digest = entry.get("token"), entry.get("sha256")
    if isinstance(token, str) and digest is None:
        plain = token.strip().encode()
        if not 0 < len(plain) <= _LONGEST_TOKEN:
            raise Invalid(f"{where} has an empty token, or one of more than {_LONGEST_TOKEN} bytes")
        return _digest_of(plain)
    found = _SHA256.fullmatch(digest) if isinstance(digest, str) and token is None else None
    if not found:
        raise Invalid(f"{where} needs either a token, or its sha256 in 64 hex digits")
    return bytes.fromhex(found[1])


def _digest_of(plain: bytes) -> bytes:
    """The sha256 of a token, which is written in plain text or as `sha256:` and 64 digits."""
    written = _SHA256.fullmatch(plain.decode("latin-1")) if plain.startswith(b"sha256:") else None
    return bytes.fromhex(written[1]) if written else hashlib.sha256(plain).digest()


def _check_unique(tokens: Iterable[_Token]) -> None:
    names, digests = set(), set()
    for token in tokens:
        if token.grant.name in names:
            raise Invalid(f"two tokens are named {token.grant.name}")
        if token.digest in digests:
            raise Invalid(f"{token.grant.name} has the token of another name")
        names.add(token.grant.name)
        digests.add(token.digest)
