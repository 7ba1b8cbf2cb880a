"""The tokens of the API, as their file or directory holds them now.

One file holds one token alone, which is an admin's, or a list:

    tokens:
      - {name: team-a, role: pull, namespaces: ["team-a-*"], token: s3cr3t}
      - {name: grafana, role: read, sha256: 9f86d081…}

In a directory, such as a mounted Secret, each file is one token, named after the file:

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

MOST_TOKENS = 1000
_LONGEST_BYTES = 256 << 10
_LONGEST_TOKEN = 4096
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RESERVED = ("anonymous",)  # who has no token is called so
_KEYS = ("name", "role", "namespaces", "token", "sha256")
_ALONE = "admin"  # what the only token of a plain file is called


@dataclass(frozen=True, slots=True)
class _Token:
    """A token by its sha256. The text is nowhere in memory."""

    digest: bytes = field(repr=False)
    grant: Grant


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file as it was read last: the sha256 of its content or of why it cannot be read, and the tokens in
    force, which are older than that where it is broken."""

    seen: bytes
    tokens: tuple[_Token, ...] = ()
    is_broken: bool = False


class TokenFile:
    """The tokens of a file, or of the files of a directory. Safe from any thread.

    It is read again at every use. A file that is broken keeps the tokens it had when it was last good, and
    the log says so once; a file that is gone, or empty, takes its tokens away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: Mapping[str, _Entry] = {}
        self._refusal = ""

    def are_in_force(self) -> bool:
        """Whether the tokens are those that the file holds now. Blocks."""
        return not self._is_behind(self._read())

    def grant_of(self, token: bytes) -> Grant | None:
        """What a token allows, None for one that is not known. Blocks.

        Raises Unauthorized when there are no tokens because they cannot be read.
        """
        entries = self._read()
        presented, found = hashlib.sha256(token).digest(), None
        for entry in entries.values():
            for known in entry.tokens:
                if hmac.compare_digest(known.digest, presented):  # all are compared, whichever it is
                    found = found or known.grant
        if self._is_behind(entries) and not any(entry.tokens for entry in entries.values()):
            raise Unauthorized(
                "the daemon's token_file cannot be read, so no token can be right",
                code="token_unreadable",
                hint="write the file, readable for the daemon; its log says what is wrong",
            )
        return found if token else None

    def _is_behind(self, entries: Mapping[str, _Entry]) -> bool:
        return bool(self._refusal) or any(entry.is_broken for entry in entries.values())

    def _read(self) -> Mapping[str, _Entry]:
        try:
            contents = _contents(self._path)
        except FileNotFoundError:
            self._refuse("there is no such file")
            self._entries = {}
            return {}
        except OSError as error:
            self._refuse(files.reason(error))
            return self._entries  # those that were good before stay
        self._refusal = ""
        is_directory = "" not in contents
        with self._lock:  # no disk is waited for here
            before = self._entries
            self._entries = {
                name: _entry(name, content, before.get(name), is_directory=is_directory, path=self._path)
                for name, content in contents.items()
            }
            return self._entries

    def _refuse(self, reason: str) -> None:
        if reason != self._refusal:
            log.warning("token_file cannot be read", path=str(self._path), reason=reason)
        self._refusal = reason


def _contents(path: Path) -> dict[str, bytes | OSError]:
    """Each file's content, or why it cannot be read; a single file is called "". Raises OSError."""
    if not path.is_dir():
        return {"": _content(path)}
    version = path / "..data"  # a mounted Secret changes by one rename of this link
    place = Path(os.path.realpath(version)) if version.is_symlink() else path
    names = sorted(name for name in os.listdir(place) if not name.startswith("."))  # noqa: PTH208
    if len(names) > MOST_TOKENS:
        raise OSError(f"more than {MOST_TOKENS} files")
    found = {}
    for name in names:
        with suppress(FileNotFoundError):  # it went meanwhile
            found[name] = _content(place / name)
    if place != path and not place.is_dir():
        return _contents(path)  # the Secret changed meanwhile
    return found


def _content(path: Path) -> bytes | OSError:
    """Raises FileNotFoundError."""
    try:
        return files.content(path, at_most=_LONGEST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        return error


def _entry(
    name: str, content: bytes | OSError, before: _Entry | None, *, is_directory: bool, path: Path
) -> _Entry:
    """A file as it is now. `before`: as it was; kept when nothing has changed, or nothing good came."""
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
        return _Entry(seen, kept, is_broken=True)


# --- what a file says; no error repeats a value: it may be a token ---


def _of_file(content: bytes) -> tuple[_Token, ...]:
    """The tokens of a single file. Raises Invalid."""
    stripped = content.strip()
    if not stripped:
        return ()
    said = None if _is_one_word(stripped) else parse(_decoded(content))
    if said is None or isinstance(said, str):
        if b"\n" in stripped:
            raise Invalid("neither one token on one line nor a list of tokens")
        return (_Token(_digest_of(stripped), Grant(_ALONE, Role.admin)),)
    listed = said.get("tokens") if isinstance(said, dict) and set(said) == {"tokens"} else said
    if not isinstance(listed, list):
        raise Invalid("write one token on one line, or tokens: and a list")
    if len(listed) > MOST_TOKENS:
        raise Invalid(f"more than {MOST_TOKENS} tokens")
    tokens = tuple(_token(each, f"tokens[{number}]") for number, each in enumerate(listed))
    _check_unique(tokens)
    return tokens


def _of_directory(name: str, content: bytes) -> tuple[_Token, ...]:
    """The token of one file of a directory. Raises Invalid."""
    if not content.strip():
        return ()
    said = None if _is_one_word(content.strip()) else parse(_decoded(content))
    if not isinstance(said, dict):
        raise Invalid("a file of a directory says role: and token: (or sha256:), and namespaces: if not all")
    if "name" in said:
        raise Invalid("no name: the file's own is the token's")
    return (_token({**said, "name": name}, "the file"),)


def _is_one_word(content: bytes) -> bool:
    return len(content.split(None, 1)) == 1 and not content.startswith((b"{", b"["))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Invalid("not UTF-8") from None


def _token(said: object, where: str) -> _Token:
    if not isinstance(said, dict):
        raise Invalid(f"{where} is no mapping of name, role and token")
    if unknown := sorted(set(said) - set(_KEYS)):
        raise Invalid(f"{where} has {len(unknown)} keys that are none of {', '.join(_KEYS)}")
    name, role = said.get("name"), said.get("role")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise Invalid(f"{where} needs a name of letters, digits, '.', '_' and '-'")
    if not isinstance(role, str) or role not in Role.__members__:
        raise Invalid(f"{where} needs a role: {', '.join(Role.__members__)}")
    return _Token(_digest(said, where), Grant(name, Role[role], _namespaces(said, where)))


def _namespaces(said: Mapping[str, object], where: str) -> Namespaces:
    if "namespaces" not in said:
        return Namespaces()
    listed = said["namespaces"]
    entries = [each.strip() for each in listed.split(",")] if isinstance(listed, str) else listed
    try:
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in entries):
            raise ValueError("is not a list")
        return Namespaces.parse(entries)
    except ValueError as error:
        raise Invalid(f"{where}: namespaces: {error}") from None


def _digest(said: Mapping[str, object], where: str) -> bytes:
    token, digest = said.get("token"), said.get("sha256")
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
    """The sha256 of a token that is written in plain, or as `sha256:` and its digits."""
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
