"""Types of options and of the API's fields: what people write, as numbers."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from cachd.model import bytes_of, has_invisible, rate_of, seconds_of


def visible(text: str) -> str:
    """`text` if it can be kept and shown. Raises ValueError."""
    if has_invisible(text):
        raise ValueError("it holds control or invisible characters")
    return text


def plain_url(value: str) -> str:
    """`value` if it is the address of a server alone. Raises ValueError."""
    try:
        url = urlsplit(value)
        is_plain = url.scheme in ("http", "https") and url.hostname and not (url.query or url.fragment)
        if is_plain and "@" not in url.netloc and url.port != 0:
            return value
    except ValueError:  # of a port or an address that is none
        pass
    raise ValueError("write https://HOST[:PORT][/PATH], with no user, password or query")


Bytes = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, lt=1 << 63)]
Rate = Annotated[int, BeforeValidator(rate_of), Field(ge=0, lt=1 << 63)]
Text = Annotated[str, AfterValidator(visible)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
Endpoint = Annotated[str, AfterValidator(plain_url)]
