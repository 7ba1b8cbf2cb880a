"""Chooses the token for the command line on the node of the daemon, from the daemon's own token_file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cachd.errors import Invalid
from cachd.policy.roles import Role
from cachd.settings.file import parse
from cachd.settings.tokens import contents

_DIGEST = "sha256:"


def own_token(path: Path) -> str | None:
    """The token with the highest role that the file or directory has in plain text; None if it has none.

    Of tokens with one role, one without namespaces comes first. None, too, when this user may not read it.
    """
    try:
        found = contents(path)
    except OSError:
        return None
    readable = {name: content for name, content in found.items() if isinstance(content, bytes)}
    return _best(each for content in readable.values() for each in _ranked(content))


def token_in(content: bytes) -> str | None:
    """The token in the content of a file, as `own_token` chooses it; None if it is in no such form."""
    return _best(_ranked(content))


def _best(ranked: Iterable[tuple[int, bool, str]]) -> str | None:
    return max(ranked, default=(0, False, None))[2]


def _ranked(content: bytes) -> Iterator[tuple[int, bool, str]]:
    """Each token in plain text, after its role and whether it has no namespaces."""
    text = content.decode("utf-8-sig", errors="replace").strip()
    if text and len(text.split()) == 1 and not text.startswith(("{", "[")):
        if not text.startswith(_DIGEST):
            yield Role.admin, True, text
        return
    try:
        parsed = parse(text)
    except Invalid:
        return
    listed = parsed.get("tokens", [parsed]) if isinstance(parsed, dict) else parsed
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and (ranked := _entry(entry)):
            yield ranked


def _entry(entry: Mapping[str, object]) -> tuple[int, bool, str] | None:
    role, token = entry.get("role"), entry.get("token")
    is_plain = isinstance(token, str) and token.strip() and not token.startswith(_DIGEST)
    if not (is_plain and isinstance(role, str) and role in Role.__members__):
        return None
    return Role[role], "namespaces" not in entry, str(token).strip()
