"""Makes single calls to the Kubernetes API as the service account of this pod.

The token is read for each call, and the authorities again when their file changes. Each call has a deadline,
and each answer a limit.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from cachd import __version__, files
from cachd.errors import CachdError, Unavailable, printable
from cachd.foreign import SMALL, load_json
from cachd.sources.detached import DetachedThreads
from cachd.sources.kubernetes_place import Place
from cachd.sources.trust import Authorities

CODE = "no_kubernetes"
_JSON = "application/json"
_LONGEST_REFUSAL_BYTES, _LONGEST_REASON = 64 << 10, 300
_MAX_ABANDONED = 2
_HINT = "check that the API server answers, and the rights of the service account: docs/kubernetes.md"


class Patch(StrEnum):
    """How the body of a patch is meant; the value is its Content-Type."""

    apply = "application/apply-patch+yaml"  # JSON is YAML
    json = "application/json-patch+json"
    strategic = "application/strategic-merge-patch+json"


@dataclass(frozen=True, slots=True)
class _Request:
    """One call. `is_read`: the caller needs the body of the answer."""

    method: str
    path: str
    kind: str = ""
    body: object = None
    is_read: bool = False


class ApiServer:
    """Calls to one API server, by one thread at a time. Any thread may `close` it.

    Every call raises Unavailable if it failed. Its `origin_status` is the HTTP status; None without an answer
    that is HTTP. `retry_after` is what the server asked for.
    """

    def __init__(self, place: Place, *, seconds: float = 10.0) -> None:
        self.place, self._seconds = place, seconds
        self._authorities = Authorities(str(place.ca_file))
        self._threads = DetachedThreads(_MAX_ABANDONED)
        self._lock = threading.Lock()
        self._abort: Callable[[], None] = lambda: None
        self._connection: HTTPSConnection | None = None
        self._is_closed = False

    def get(self, path: str) -> Any:
        """The JSON document at `path`."""
        return self._call(_Request("GET", path, is_read=True))

    def patch(self, path: str, kind: Patch, body: object) -> None:
        """Patch the object at `path`."""
        self._call(_Request("PATCH", path, kind, body))

    def create(self, path: str, body: Mapping[str, object]) -> None:
        """Create an object in the collection `path`."""
        self._call(_Request("POST", path, _JSON, body))

    def ask(self, path: str, body: Mapping[str, object]) -> Any:
        """The JSON document that answers a request which creates nothing, such as a review."""
        return self._call(_Request("POST", path, _JSON, body, is_read=True))

    def close(self) -> None:
        """End the call that runs, and refuse all that follow."""
        with self._lock:
            self._is_closed = True
            self._abort()

    def _call(self, request: _Request) -> Any:
        try:
            with self._threads.one(self._seconds) as thread:
                with self._lock:
                    if self._is_closed:
                        raise TimeoutError("the daemon stops")
                    self._abort = thread.abort
                return thread.call(self._send, request)
        except TimeoutError as error:
            if self._connection is not None and self._connection.sock is not None:
                with suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the abandoned thread
            raise self._unavailable(files.reason(error)) from None

    def _send(self, request: _Request) -> Any:
        try:
            headers = {
                **self.place.authorization(),
                "Accept": _JSON,
                "User-Agent": f"cachd/{__version__}",
            } | ({"Content-Type": request.kind} if request.kind else {})
            context = self._authorities.context()
            connection = HTTPSConnection(*self.place.address, timeout=self._seconds, context=context)
            self._connection = connection
            with closing(connection):
                content = None if request.body is None else json.dumps(request.body).encode()
                connection.request(request.method, request.path, content, headers)
                return self._answer(connection.getresponse(), is_read=request.is_read)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._seconds:g} s") from None
        except CachdError as error:
            raise error if error.code == CODE else self._unavailable(error.detail) from error
        except (OSError, HTTPException, ValueError) as error:
            reason = files.reason(error) if isinstance(error, OSError) else type(error).__name__
            raise self._unavailable(reason) from error

    def _answer(self, answer: HTTPResponse, *, is_read: bool) -> Any:
        if not 200 <= answer.status < 300:
            reason = _reason(answer.read(_LONGEST_REFUSAL_BYTES))
            asked = answer.headers.get("Retry-After", "")
            raise self._unavailable(
                f"it answered {answer.status}{f': {reason}' if reason else ''}",
                status=answer.status,
                retry_after=float(asked[:4]) if asked.isascii() and asked.isdecimal() else None,
            )
        if not is_read:  # what a write answers is the object, of which nothing is needed
            return None
        return load_json(answer.read(SMALL.size_bytes + 1), "the answer of the API server")

    def _unavailable(
        self, reason: str, *, status: int | None = None, retry_after: float | None = None
    ) -> Unavailable:
        return Unavailable(
            f"the Kubernetes API: {reason}"[:500],
            code=CODE,
            hint=_HINT,
            origin_status=status,
            retry_after=retry_after,
        ).withhold(url=self.place.url)


def _reason(content: bytes) -> str:
    """The message of a Status object; empty if it is none."""
    try:
        found = load_json(content, "the refusal")
    except (ValueError, CachdError):
        return ""
    message = found.get("message") if isinstance(found, dict) else None
    return printable(message[:_LONGEST_REASON]) if isinstance(message, str) else ""
