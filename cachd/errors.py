"""What can go wrong, in classes that say what the caller may do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

_LONGEST_TEXT = 4000


def printable(text: str) -> str:
    """`text` as it may be shown on a terminal and sent as JSON, whoever wrote it.

    Control characters, invisible ones and lone surrogates become escapes (`\\x1b`); a text of more than
    4,000 characters is cut.
    """
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CachdError(Exception):
    """A failure with a stable `code`, a `detail` that names the thing and its numbers, and a `hint`.

    `hint` says what the reader can do about it; `facts` carries the numbers for machines. None of them
    ever holds a secret or the query of a signed URL, nor a character that a terminal would obey: texts of
    origins and clients may stand in them. Anybody may read these. What only the operator may know, such as
    the address of a private name, goes to `withhold`.
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
        """The same error, with facts for the daemon's own log: no document and no answer shows them."""
        self.withheld = {
            name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()
        }
        return self

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    def as_document(self) -> dict[str, object]:
        """The error as JSON members: code, detail, hint when there is one, its class, and the facts."""
        hint = {"hint": self.hint} if self.hint else {}
        about = {"code": self.code, "detail": self.detail, **hint, "error_class": type(self).__name__}
        return about | dict(self.facts)


class Invalid(CachdError):
    """The request cannot be understood. Change it."""

    code = "invalid"


class Forbidden(CachdError):
    """Policy, a token or the source says no. Change the permission, not the request."""

    code = "forbidden"


class Unauthorized(Forbidden):
    """The daemon wants a bearer token it was not given."""

    code = "unauthorized"


class NotFound(CachdError):
    """There is no such model, revision or file."""

    code = "not_found"


class NotKnown(NotFound):
    """No cachd of this node has heard of the model."""

    code = "not_known"


class InUse(CachdError):
    """Somebody holds the thing: a pin, an open file, a running pull, another daemon."""

    code = "in_use"


class TooBig(CachdError):
    """It can never fit on this disk."""

    code = "too_big"


class NoSpace(CachdError):
    """It does not fit now."""

    code = "no_space"
    retryable = True


class Changed(CachdError):
    """The source's validator moved: what was read belongs to another revision. Resolve again."""

    code = "changed"
    retryable = True


class Corrupt(CachdError):
    """The bytes disagree with their digest and were discarded."""

    code = "corrupt"


class Unavailable(CachdError):
    """The source did not answer as it should. Try again after `retry_after` seconds, when it said so."""

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
    """Another process holds a kernel lease on the file, so that to open it would mean to wait. Try again: the
    kernel ends a lease that is in the way after `fs.lease-break-time` seconds."""

    code = "file_leased"


class DiskFailed(CachdError):
    """The node's disk refused an operation for a reason other than space."""

    code = "disk_failed"


class Cancelled(CachdError):
    """The pull was told to stop."""

    code = "cancelled"


class WaitTimeout(CachdError):
    """The caller's patience ended before the pull did; the pull goes on."""

    code = "wait_timeout"


class Unreachable(CachdError):
    """No daemon answers at the address."""

    code = "daemon_unreachable"


def error_of(document: Mapping[str, Any]) -> CachdError:
    """The error that a document tells of, of the class it had in the daemon."""
    kind = globals().get(str(document.get("error_class")))
    if not (isinstance(kind, type) and issubclass(kind, CachdError)):
        kind = CachdError
    detail, hint = str(document.get("detail", "no detail")), str(document.get("hint", ""))
    return kind(detail, code=str(document.get("code", "internal")), hint=hint)
