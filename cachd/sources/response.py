"""The response to one HTTP request, whose body is checked for its length and its rate while it is read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cached_property
from typing import Self
from urllib.parse import SplitResult

from cachd.errors import Unavailable
from cachd.foreign import too_large
from cachd.model import Extent
from cachd.sources import validators
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection
from cachd.sources.failures import BROKEN, bare, broken, protocol_error
from cachd.sources.http1 import FramedBody, Head, number

SLOWEST_BYTES_PER_SECOND = 1024
MISDIRECTED = 421  # RFC 9110, 15.5.20
_SHORT_BYTES = 64 << 10
_CONTENT_RANGE = re.compile(
    r"bytes[ =:]? *([0-9]{1,18}) *- *([0-9]{1,18}) */ *([0-9]{1,18}|\*)", re.IGNORECASE
)


def content_range(header: str | None) -> tuple[int, int, int | None] | None:
    """The first and the last byte of a Content-Range and the file's size, None for `*`; None if it is none.

    Servers also write it as `bytes=0-9/10`, or with other spaces: the numbers decide. Numbers that contradict
    each other say nothing (RFC 9110, 14.4).
    """
    found = _CONTENT_RANGE.fullmatch(header) if header else None
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    return (first, last, total) if first <= last and (total is None or last < total) else None


class Response:
    """One response to a request for `url`. One thread reads and closes it; any thread may call `abort`.

    `status`, `reason`, `headers` and `stated_length` (Content-Length) are there from the start. The body is
    read by `readinto` or `content`. The caller closes the response.
    """

    def __init__(
        self,
        head: Head,
        body: FramedBody,
        connection: Connection,
        url: SplitResult,
        *,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status, self.reason, self.headers = head.status, head.reason, head.headers
        self.stated_length = body.stated_length
        self._body, self._connection, self._url = body, connection, url
        self._stall_seconds, self._clock = stall_seconds, clock
        self._size: int | None = body.length
        self._got = self._skip = 0
        self._is_short = self._is_long = False
        self._failure: Unavailable | None = None
        self._returned_at = self._window_began = clock()
        self._window_got = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The URL that answered, without user and query."""
        return bare(self._url.geturl())

    @property
    def size(self) -> int | None:
        """The number of bytes in the body; None if it was not stated."""
        return self._size

    @property
    def size_is_unstated(self) -> bool:
        """Whether no header states how many bytes the body has."""
        return self.status == 200 and self._body.length is None

    @property
    def is_partial(self) -> bool:
        """Whether the body is a part of the file: by its status or, where that is 200, by its headers.

        rclone answers a range with 200. Then Content-Length must be that of the range in Content-Range, and
        less than the size of the file.
        """
        if self.status != 200:
            return self.status == 206
        stated = content_range(self.headers.get("Content-Range"))
        if stated is None:
            return False
        first, last, total = stated
        return total is not None and number(self.stated_length) == last + 1 - first < total

    @property
    def file_size(self) -> int | None:
        """The size of the file that the response is about; None if it was not stated."""
        if self.is_partial:
            stated = content_range(self.headers.get("Content-Range"))
            return stated[2] if stated else None
        return number(self.stated_length)

    @cached_property
    def validator(self) -> str | None:
        """The file's ETag, else its date, else None: see `validators.validator`."""
        return validators.validator(self.headers)

    @property
    def _shown(self) -> str:
        return bare(self._url.geturl())

    def expect(self, body: Extent, *, asked: Extent) -> None:
        """Set which extent of the file the body has, and which of it `readinto` gives: what was asked for.

        If bytes of `asked` are missing at its end, `readinto` raises Unavailable there. A body that goes on
        after `asked` is not read to its end.
        """
        self._skip = asked.start - body.start
        self._size = min(body.stop, asked.stop) - asked.start
        self._is_short, self._is_long = body.stop < asked.stop, body.stop > asked.stop

    def content(self, cancel_token: CancelToken, *, at_most: int) -> bytes:
        """The complete body, of a length that is checked before it is read, if the origin states it.

        Raises Invalid over `at_most` bytes, Unavailable or Cancelled.
        """
        if self._size is not None and self._size > at_most:
            raise too_large(self._shown, at_most, self._size)
        content, buffer = bytearray(), memoryview(bytearray(_SHORT_BYTES))
        with cancel_token.reaches(self):
            while count := self.readinto(buffer[: at_most + 1 - len(content)]):
                content += buffer[:count]
                cancel_token.count()
        if len(content) > at_most:
            raise too_large(self._shown, at_most)
        return bytes(content)

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        if self._failure:
            raise self._failure
        before = self._got
        try:
            return self._fill(view)
        except Unavailable as error:
            if self._got in (before, self._size):
                raise
            self._failure = error  # the next call raises it: these bytes came before it
            return self._got - before

    def _fill(self, view: memoryview) -> int:
        if self._is_short and self._got == self._size:
            message = f"{self._shown}: the origin sends only {self._size} bytes of this part at once"
            raise Unavailable(message, code="ended_early", retry_after=0.0)
        self._window_began += self._clock() - self._returned_at  # the caller's time does not count
        while self._skip:
            n = self._receive(view[: self._skip])
            if not n:
                raise Unavailable(
                    f"{self._shown}: the connection ended before its first byte", code="ended_early"
                )
            self._skip -= n
        wanted = len(view) if self._size is None else min(len(view), self._size - self._got)
        filled = 0
        while filled < wanted:
            n = self._receive(view[filled:wanted])
            if not n:
                break
            filled += n
            self._got += n
            self._check_rate()
        if self._size is not None and filled < wanted:
            raise Unavailable(
                f"{self._shown}: the connection ended after {self._got} of {self._size} bytes",
                code="ended_early",
            )
        if self._got == self._size:
            self._check_end()
        self._returned_at = self._clock()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        self._connection.abort()

    def close(self) -> None:
        """Return the connection to its pool if the body was read to its end, else close it.

        After a 421 it is closed, too: its server does not serve this origin (RFC 9110, 15.5.20).
        """
        self._failure = None  # its traceback refers to this object: a reference cycle
        is_read = self._got == self._size and not self._is_long
        if is_read and self._body.is_over and self.status != MISDIRECTED:
            self._connection.keep()
        else:
            self._connection.close()

    def _receive(self, view: memoryview) -> int:
        try:
            return self._body.readinto(view)
        except BROKEN as error:
            raise broken(self._url, error, self._connection.proxy) from error

    def _check_rate(self) -> None:
        """Raises Unavailable when a window of `stall_seconds` brought too few bytes a second."""
        now = self._clock()
        elapsed = now - self._window_began
        if elapsed < self._stall_seconds:
            return
        rate = (self._got - self._window_got) / elapsed
        if rate < SLOWEST_BYTES_PER_SECOND:
            raise Unavailable(
                f"{self._shown}: only {rate:.0f} bytes a second for {elapsed:.0f} s", code="too_slow"
            )
        self._window_began, self._window_got = now, self._got

    def _check_end(self) -> None:
        """Raises Unavailable when a body without a Content-Length continues after the expected size."""
        if self.stated_length is None and not self._is_long and self._receive(memoryview(bytearray(1))):
            raise protocol_error(self._shown, f"the body continues after the expected {self._size} bytes")
