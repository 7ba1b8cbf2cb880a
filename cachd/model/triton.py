"""Where the plain view has the files of a model with `layout: triton`, so that Triton serves them.

    config.pbtxt    Triton's configuration of the model, if the source has one
    1/<path>        every other file: version 1 of the model

Triton wants this of each model in a model repository. A source that has versions or is a model repository
stays as it is. Triton ignores a directory such as `01`, so it is no version; `0` is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cachd.errors import Invalid

TRITON = "triton"
VERSION = "1"
CONFIGURATION = "config.pbtxt"
_ARRANGED = re.compile(rf"(?:0|[1-9][0-9]*)/.|[^/]+/{re.escape(CONFIGURATION)}$")


def check_layout(layout: object) -> str | None:
    """The layout, if it is one or None. Raises Invalid."""
    if layout in (None, TRITON):
        return TRITON if layout else None
    raise Invalid(f"layout is {layout!r:.80}", code="bad_layout", hint=f"use {TRITON}, or leave it out")


def layout_of(paths: Iterable[str], asked: str | None) -> str | None:
    """The layout that a model of these files gets; None if its files stay where the source has them."""
    return None if any(map(_ARRANGED.match, paths)) else asked


def place_of(path: str, layout: str | None) -> str:
    """Where the plain view has a file, relative to the model's directory."""
    return f"{VERSION}/{path}" if layout == TRITON and path != CONFIGURATION else path
