"""Pydantic types that parse and check the values of options and API fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from cachd.model import bytes_of, has_invisible, rate_of, seconds_of


def visible(text: str) -> str:
    """`text`. Raises ValueError if it holds control or invisible characters."""
    if has_invisible(text):
        raise ValueError("it holds control or invisible characters")
    return text


def plain_url(value: str) -> str:
    """`value`. Raises ValueError unless it is an http(s) URL without user, password, query or fragment."""
    try:
        url = urlsplit(value)
        is_plain = url.scheme in ("http", "https") and url.hostname and not (url.query or url.fragment)
        if is_plain and "@" not in url.netloc and url.port != 0:
            return value
    except ValueError:  # an invalid port or address
        pass
    raise ValueError("write https://HOST[:PORT][/PATH], with no user, password or query")


def absolute(path: Path) -> Path:
    """`path`, made absolute: it is shown to processes that run in other directories."""
    try:
        return path.absolute()
    except OSError:  # the working directory was removed
        return path


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
Bytes = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, lt=1 << 63)]
Rate = Annotated[int, BeforeValidator(rate_of), Field(ge=0, lt=1 << 63)]
Text = Annotated[str, AfterValidator(visible)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
Endpoint = Annotated[str, AfterValidator(plain_url)]
