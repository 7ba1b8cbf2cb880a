"""Reads from a request what it asks for, if it is a call that the endpoint answers.

    GET       /api/models/ORG/NAME[/revision/REV]          what a revision has, and its commit
    GET       /api/models/ORG/NAME/tree/REV[/DIR]          its files and directories, in pages
    POST      /api/models/ORG/NAME/paths-info/REV          some of them
    GET       /api/models/ORG/NAME/refs                    the revisions that are here
    GET HEAD  /ORG/NAME/resolve/REV/PATH                   a file
    GET HEAD  /.attempt/N/ORG/NAME/resolve/COMMIT/PATH     a file of which this node has only a part

HEAD is answered like GET. REV is one percent-encoded segment.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

from cachd.errors import Invalid
from cachd.foreign import Limit, load_json
from cachd.serve.exchange import MAX_BODY_BYTES, Request

MAX_PATHS = 10_000
_PATHS = Limit(MAX_BODY_BYTES, tokens=MAX_PATHS + 100, depth=4)
_ATTEMPT = ".attempt"
_AUTHORITY = re.compile(r"https?://[^/?]*", re.IGNORECASE)  # of a target in absolute form (RFC 9112, 3.2.2)


class Kind(enum.Enum):
    """The subject of a call."""

    info = enum.auto()
    tree = enum.auto()
    paths_info = enum.auto()
    refs = enum.auto()
    file = enum.auto()


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `path`: of a file or a directory. `attempt`: the number in the address; None without one."""

    kind: Kind
    repo: str
    revision: str = "main"
    path: str = ""
    attempt: int | None = None


def call_of(request: Request) -> Call | None:
    """The call that a request makes; None if the endpoint does not answer it."""
    call = _call_of(request)
    # A segment with an encoded slash could name what is no model, as datasets%2Forg/name does.
    return call if call is not None and call.repo.count("/") == 1 else None


def _call_of(request: Request) -> Call | None:
    segments = [unquote(each) for each in path_of(request).removeprefix("/").split("/")]
    if request.method == "POST":
        return _posted(segments)
    if request.method not in ("GET", "HEAD"):
        return None
    match segments:
        case ["api", "models", org, name]:
            return Call(Kind.info, f"{org}/{name}")
        case ["api", "models", org, name, "revision", revision]:
            return Call(Kind.info, f"{org}/{name}", revision)
        case ["api", "models", org, name, "tree", revision, *directory]:
            return Call(Kind.tree, f"{org}/{name}", revision, "/".join(directory).rstrip("/"))
        case ["api", "models", org, name, "refs"]:
            return Call(Kind.refs, f"{org}/{name}")
        case [first, number, org, name, "resolve", commit, *path] if first == _ATTEMPT and path:
            known = number.isascii() and number.isdecimal() and len(number) < 10
            return Call(Kind.file, f"{org}/{name}", commit, "/".join(path), int(number)) if known else None
        case [org, name, "resolve", revision, *path] if path:
            return Call(Kind.file, f"{org}/{name}", revision, "/".join(path))
    return None


def address_of(call: Call, commit: str, attempt: int, quoted: str) -> str:
    """The path of the address of an attempt. `quoted`: the percent-encoded path of the file."""
    return f"/{_ATTEMPT}/{attempt}/{call.repo}/resolve/{commit}/{quoted}"


def _posted(segments: list[str]) -> Call | None:
    match segments:
        case ["api", "models", org, name, "paths-info", revision]:
            return Call(Kind.paths_info, f"{org}/{name}", revision)
    return None


def path_of(request: Request) -> str:
    """The path that is asked for, percent-encoded."""
    return _AUTHORITY.sub("", request.target, count=1).partition("?")[0]


def query_of(request: Request) -> dict[str, str]:
    """The first value of each parameter of the query. Raises Invalid for too many."""
    return {name: values[0] for name, values in _fields(request.target.partition("?")[2]).items()}


def paths_of(request: Request) -> list[str]:
    """The paths that a call of paths-info asks for: a form or JSON. Raises Invalid."""
    try:
        if "json" in request.headers.get("content-type", ""):
            asked = load_json(request.body, "the request", _PATHS)
            found = asked["paths"]
        else:
            found = _fields(request.body.decode()).get("paths", [])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Invalid("the body is not a list of paths", code="invalid_request") from error
    paths = [found] if isinstance(found, str) else found
    if not isinstance(paths, list) or len(paths) > MAX_PATHS or not all(isinstance(p, str) for p in paths):
        raise Invalid(f"at most {MAX_PATHS} paths are allowed", code="invalid_request")
    return paths


def _fields(text: str) -> dict[str, list[str]]:
    try:
        return parse_qs(text, max_num_fields=MAX_PATHS)
    except ValueError as error:
        raise Invalid(f"at most {MAX_PATHS} fields are allowed", code="invalid_request") from error
