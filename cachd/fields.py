"""Types of options and of the API's fields: what people write, as numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from cachd.model import bytes_of, rate_of, seconds_of

Bytes = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, lt=1 << 63)]
Rate = Annotated[int, BeforeValidator(rate_of), Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
