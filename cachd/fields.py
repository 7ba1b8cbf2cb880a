"""Types of options and of the API's fields: what people write, as numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from cachd.model import bytes_of, has_invisible, rate_of, seconds_of


def visible(text: str) -> str:
    """`text` if it can be kept and shown. Raises ValueError."""
    if has_invisible(text):
        raise ValueError("it holds control or invisible characters")
    return text


Bytes = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, lt=1 << 63)]
Rate = Annotated[int, BeforeValidator(rate_of), Field(ge=0, lt=1 << 63)]
Text = Annotated[str, AfterValidator(visible)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
