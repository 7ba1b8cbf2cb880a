"""Defines what the endpoint answers: a status, headers, and a body in memory or of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cachd.errors import CachdError, Invalid, NotFound
from cachd.report.outcomes import outcome_of

_RETRY_SECONDS = 5


class Sink(Protocol):
    """The receiver of the bytes of a body."""

    def send(self, content: bytes) -> None:
        """Send bytes that are in memory. Raises ConnectionError if the client left."""

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send `count` bytes of an open file from `offset` on. Raises ConnectionError if the client left."""

    def check(self) -> None:
        """Raises ConnectionError when the client has left, or the daemon is stopping."""


class Body(Protocol):
    """The bytes of an answer."""

    @property
    def size(self) -> int:
        """The number of bytes."""

    @property
    def waits(self) -> bool:
        """Whether the bytes may still have to arrive at the node."""

    def send(self, sink: Sink) -> None:
        """Send all bytes. Raises Aborted if they must not be completed."""


class Aborted(Exception):
    """The rest of a body cannot be sent. The connection must be closed, so that the client notices."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `body`: bytes, or what sends them. `call`: the kind of call, for the metrics."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Body = b""
    call: str = "none"

    @property
    def size(self) -> int:
        """The bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.size

    @property
    def waits(self) -> bool:
        """Whether its body waits for bytes of a pull."""
        return not isinstance(self.body, bytes) and self.body.waits


def document(value: object, **headers: str) -> Answer:
    """An answer with a JSON document. `_` in the name of a header stands for '-'."""
    return listing(json.dumps(value).encode(), **headers)


def listing(body: bytes | Body, **headers: str) -> Answer:
    """An answer whose body is a JSON document."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(200, {"Content-Type": "application/json; charset=utf-8", **named}, body)


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An answer that refuses as the Hub does. `code`: its X-Error-Code, which clients read."""
    said = {name.replace("_", "-"): text for name, text in headers.items()}
    plain = "".join(c if " " <= c <= "~" else "?" for c in message)[:300].strip()  # h11 refuses other headers
    if code is not None:
        said["X-Error-Code"] = code
    content = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": plain}
    return Answer(status, {**content, **said}, json.dumps({"error": message}).encode())


def no_repository(repo: str) -> Answer:
    """The repository does not exist, or nobody here may know of it."""
    return refusal(404, f"Repository not found: {repo:.200}", "RepoNotFound")


def no_revision(revision: str) -> Answer:
    """The repository has no such branch, tag or commit."""
    return refusal(404, f"Invalid rev id: {revision:.200}", "RevisionNotFound")


def no_entry(path: str, commit: str) -> Answer:
    """The commit has no such file. Clients remember this for the commit."""
    return refusal(404, f"Entry not found: {path:.200}", "EntryNotFound", X_Repo_Commit=commit)


def refused(error: CachdError, repo: str) -> Answer:
    """The answer for an error of cachd, in the words of the Hub where it has some.

    A repository that the operator's lists refuse is answered as one that does not exist.
    """
    if error.code == "revision_not_found":
        return refusal(404, error.detail, "RevisionNotFound")
    if error.code == "gated":
        return refusal(403, error.detail, "GatedRepo")
    status = outcome_of(error).status
    if isinstance(error, NotFound | Invalid) or status in (401, 403):
        return no_repository(repo)
    if status in (409, 503):
        after = getattr(error, "retry_after", None) or _RETRY_SECONDS
        # A conflict names another model, which this caller perhaps may not know of.
        message = f"{repo:.200} cannot be pulled now: {error.code}" if status == 409 else str(error)
        return refusal(503, message, Retry_After=str(round(after)))
    return refusal(status, str(error))
