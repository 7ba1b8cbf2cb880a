"""The exceptions of cachd. Each class says what the caller can do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

_LONGEST_TEXT = 4000


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


class CachdError(Exception):
    """A failure with a stable `code`, a `detail` that names the thing and its numbers, and a `hint`.

    `hint` says what the reader can do about it. `facts` has the numbers for programs. Anybody may read all
    of these, so callers put no secret and no query of a signed URL into them. They may quote an origin or a
    client: control characters are escaped. Facts that only the operator may know, such as the address of a
    private name, go to `withhold`.
    """

    code = "internal"
    retryable = False
    withheld: Mapping[str, object] = {}

    def __init__(self, detail: str, *, code: str | None = None, hint: str = "", **facts: object) -> None:
        self.detail = "\n".join(map(printable, detail.split("\n")))
        super().__init__(self.detail)
        self.code = code or type(self).code
        self.hint = printable(hint)
        self.facts: Mapping[str, object] = {
            name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()
        }

    def withhold(self, **facts: object) -> Self:
        """Add facts for the daemon's log, which no API response and no document shows. Returns the error."""
        self.withheld = {
            name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()
        }
        return self

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    def as_document(self) -> dict[str, object]:
        """The error as JSON: `code`, `detail`, `hint` if there is one, `error_class`, and the facts."""
        hint = {"hint": self.hint} if self.hint else {}
        about = {"code": self.code, "detail": self.detail, **hint, "error_class": type(self).__name__}
        return about | dict(self.facts)


class Invalid(CachdError):
    """The request or an option is wrong. Change it."""

    code = "invalid"


class Forbidden(CachdError):
    """Policy, permissions, a token or the source do not allow it. Change the permission, not the request."""

    code = "forbidden"


class Unauthorized(Forbidden):
    """The request has no valid bearer token, and the daemon needs one."""

    code = "unauthorized"


class NotFound(CachdError):
    """The model, revision or file does not exist. Change the request."""

    code = "not_found"


class NotKnown(NotFound):
    """No daemon of this node knows the model. List it in the configuration, or ask for it."""

    code = "not_known"


class InUse(CachdError):
    """A pin, an open file, a running pull or another daemon holds the thing. Wait, or release it."""

    code = "in_use"


class TooBig(CachdError):
    """The model can never fit on this disk. Use a larger disk, or select fewer files."""

    code = "too_big"


class NoSpace(CachdError):
    """The model does not fit on the disk now. Free space, or try again later.

    `short`, `short_inodes`: the bytes or inodes to free for it; 0 when that number is not known.
    """

    code = "no_space"
    retryable = True

    def __init__(
        self,
        detail: str,
        *,
        short: int = 0,
        short_inodes: int = 0,
        code: str | None = None,
        hint: str = "",
        **facts: object,
    ) -> None:
        missing = {"short": short, "short_inodes": short_inodes}
        facts |= {name: count for name, count in missing.items() if count}
        super().__init__(detail, code=code, hint=hint, **facts)
        self.short, self.short_inodes = short, short_inodes


class Changed(CachdError):
    """A file changed at its source (another validator, such as an ETag). Resolve the ref again."""

    code = "changed"
    retryable = True


class Corrupt(CachdError):
    """The bytes did not match their digest, and cachd discarded them."""

    code = "corrupt"


class Unavailable(CachdError):
    """The source failed or did not answer. Try again later, after `retry_after` seconds if that is set."""

    code = "unavailable"
    retryable = True

    def __init__(
        self,
        detail: str,
        *,
        retry_after: float | None = None,
        code: str | None = None,
        hint: str = "",
        **facts: object,
    ) -> None:
        super().__init__(detail, code=code, hint=hint, **facts)
        self.retry_after = retry_after


class Leased(Unavailable):
    """Another process holds a kernel lease on the file, and an open would block (fcntl(2), F_SETLEASE).

    Try again: the kernel breaks the lease `fs.lease-break-time` seconds after the attempt to open the file.
    """

    code = "file_leased"


class DiskFailed(CachdError):
    """An operation on the node's disk failed, and not for lack of space. Repair the disk or its mount."""

    code = "disk_failed"


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
    detail, hint = str(document.get("detail", "no detail")), str(document.get("hint", ""))
    return kind(detail, code=str(document.get("code", "internal")), hint=hint)
