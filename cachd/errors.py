"""The exceptions of cachd. Each class says what the caller can do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Self

_LONGEST_TEXT = 4000
_NOTHING: Mapping[str, object] = MappingProxyType({})
_TEXTS = 3  # the first fields of every error: detail, code, hint


def printable(text: str) -> str:
    r"""`text` made safe to print on a terminal and to send as JSON, even if a stranger wrote it.

    Control characters, invisible characters and lone surrogates become escapes (`\x1b`). A text of more
    than 4,000 characters is truncated.
    """
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(kw_only=True, eq=False, repr=False)
class CachdError(Exception):
    """A failure with a stable `code`, a `detail` that names the thing and its numbers, and a `hint`.

    `hint` says what the reader can do about it. `origin_status` is the HTTP status that the source answered.
    `bytes_done` and `bytes_total` say how far the pull was that failed. The other fields are those of the
    class; a field at its default does not apply.

    Anybody may read all fields, so callers put no secret and no query of a signed URL into them. They may
    quote an origin or a client: control characters are escaped. Facts that only the operator may know, such
    as the address of a private name, go to `withhold`.
    """

    retryable: ClassVar[bool] = False
    withheld = _NOTHING  # facts for the daemon's log alone; not annotated, so that it is no field

    detail: str = field(kw_only=False)
    code: str = ""  # without one, that of the class
    hint: str = ""
    origin_status: int | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None

    def __post_init__(self) -> None:
        self.code = self.code or type(self).code or "internal"
        self.detail = "\n".join(map(printable, self.detail.split("\n")))
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) and each.name != "detail":
                setattr(self, each.name, printable(value))
        super().__init__(self.detail)

    def withhold(self, **facts: object) -> Self:
        """Add facts for the daemon's log, which no API response and no document shows. Returns the error."""
        self.withheld = {
            name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()
        }
        return self

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    @property
    def facts(self) -> dict[str, object]:
        """The fields that apply, by name, besides detail, code and hint: those that are not the default."""
        values = ((each, getattr(self, each.name)) for each in fields(self)[_TEXTS:])
        return {each.name: value for each, value in values if value != each.default}

    def as_document(self) -> dict[str, Any]:
        """The error as JSON: `code`, `detail`, `hint` if there is one, `error_class`, and the facts."""
        hint = {"hint": self.hint} if self.hint else {}
        about = {"code": self.code, "detail": self.detail, **hint, "error_class": type(self).__name__}
        return about | self.facts


class Invalid(CachdError):
    """The request or an option is wrong. Change it."""

    code = "invalid"


@dataclass(kw_only=True, eq=False, repr=False)
class Forbidden(CachdError):
    """Policy, permissions, a token or the source do not allow it. Change the permission, not the request.

    `role_needed` and `role`: the role that the call needs, and that of the token. `hub_error`: the Hub's
    X-Error-Code. `proxy_status`: the HTTP status that the proxy answered.
    """

    code = "forbidden"
    role_needed: str | None = None
    role: str | None = None
    hub_error: str | None = None
    proxy_status: int | None = None


class Unauthorized(Forbidden):
    """The request has no valid bearer token, and the daemon needs one."""

    code = "unauthorized"


@dataclass(kw_only=True, eq=False, repr=False)
class UnsafeRoot(Forbidden):
    """Other users could change the directory `path`. Change its owner or its mode (octal digits)."""

    code = "unsafe_root"
    path: str | None = None
    mode: str | None = None
    uid: int | None = None
    gid: int | None = None


class NotFound(CachdError):
    """The model, revision or file does not exist. Change the request."""

    code = "not_found"


class NotKnown(NotFound):
    """No daemon of this node knows the model. List it in the configuration, or ask for it."""

    code = "not_known"


class InUse(CachdError):
    """A pin, an open file, a running pull or another daemon holds the thing. Wait, or release it."""

    code = "in_use"


@dataclass(kw_only=True, eq=False, repr=False)
class TooBig(CachdError):
    """The model can never fit on this disk. Use a larger disk, or select fewer files.

    `need` and `usable`: its bytes, and the most bytes that models can take here.
    """

    code = "too_big"
    need: int | None = None
    usable: int | None = None


@dataclass(kw_only=True, eq=False, repr=False)
class NoSpace(CachdError):
    """The model does not fit on the disk now. Free space, or try again later.

    `need` and `free`: the bytes needed and those that are free. `short` and `short_inodes`: how many bytes or
    inodes are to be freed for it; 0 when that number is not known. `held_by`: what holds the
    space, in words.
    """

    code = "no_space"
    retryable = True
    need: int | None = None
    free: int | None = None
    short: int = 0
    short_inodes: int = 0
    held_by: list[str] | None = None


class Changed(CachdError):
    """A file changed at its source (another validator, such as an ETag). Resolve the ref again."""

    code = "changed"
    retryable = True


@dataclass(kw_only=True, eq=False, repr=False)
class Corrupt(CachdError):
    """The bytes of `file` did not match their digest, and cachd discarded them.

    `expected` and `got`: the digest that they should have, and the one that they had.
    """

    code = "corrupt"
    file: str | None = None
    expected: str | None = None
    got: str | None = None


@dataclass(kw_only=True, eq=False, repr=False)
class Unavailable(CachdError):
    """The source failed or did not answer. Try again later, after `retry_after` seconds if that is set.

    `proxy_status`: the HTTP status that the proxy answered.
    """

    code = "unavailable"
    retryable = True
    retry_after: float | None = None
    proxy_status: int | None = None


class Busy(Unavailable):
    """The daemon or the node has no thread, open file or connection left for this. Try again later."""

    code = "busy"


class Leased(Unavailable):
    """Another process holds a kernel lease on the file, and an open would block (fcntl(2), F_SETLEASE).

    Try again: the kernel breaks the lease `fs.lease-break-time` seconds after the attempt to open the file.
    """

    code = "file_leased"


@dataclass(kw_only=True, eq=False, repr=False)
class DiskFailed(CachdError):
    """An operation on the node's disk failed, and not for lack of space. Repair the disk or its mount.

    `errno`: the number of the system's error. `size`: the bytes of the file system if they are too few.
    """

    code = "disk_failed"
    errno: int | None = None
    size: int | None = None


@dataclass(kw_only=True, eq=False, repr=False)
class DaemonDied(CachdError):
    """The daemon died `deaths` times in a row during a pull. See its log and its memory limit."""

    code = "crash_loop"
    deaths: int | None = None


class Cancelled(CachdError):
    """The pull was cancelled."""

    code = "cancelled"


class WaitTimeout(CachdError):
    """The time to wait ended before the pull did. The pull continues, unless it runs in this process."""

    code = "wait_timeout"


class Unreachable(CachdError):
    """No daemon answers at the address. Check the address, and whether the daemon runs."""

    code = "daemon_unreachable"


def error_of(document: Mapping[str, Any]) -> CachdError:
    """The exception described by a document of `as_document`, with the class that it had in the daemon."""
    kind = globals().get(str(document.get("error_class")))
    if not (isinstance(kind, type) and issubclass(kind, CachdError)):
        kind = CachdError
    detail, hint = str(document.get("detail", "no detail")), str(document.get("hint") or "")
    known = [each.name for each in fields(kind)[_TEXTS:]]
    facts = {
        name: document[name] for name in known if isinstance(document.get(name), str | int | float | list)
    }
    return kind(detail, code=str(document.get("code", "internal")), hint=hint, **facts)
