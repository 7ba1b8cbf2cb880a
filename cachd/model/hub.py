"""The grammar of hf:// refs: an organisation, a model, and perhaps a revision."""

from __future__ import annotations

import re
from urllib.parse import unquote

from cachd.errors import Invalid
from cachd.model.grammar import Located, Steps, not_a_prefix
from cachd.model.name import shown

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
SPECIAL_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)", re.ASCII)  # may contain '/'
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_FOLDER = re.compile(r"(?:models|datasets|spaces|kernels)--[^/@]+")  # of one repository, in a Hub cache
_IN_FOLDER = re.compile(rf"(.*/{HUB_FOLDER.pattern})@([^@]+?)/*", re.DOTALL)
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*")


class HubGrammar:
    """`org/model[@revision]`. See `Grammar`."""

    has_host = False
    root = ""
    is_address = False

    def parse(self, text: str, rest: str) -> Located:
        """See `Grammar.parse`."""
        repo, at, revision = rest.partition("@")
        return Located(*hub_location(text, repo, revision.replace("%2F", "/") if at else None))

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """See `Grammar.prefix`. The Hub accepts a name in any case, and redirects to the right one."""
        parts = rest.removesuffix("/").split("/")
        if len(parts) > 2 or not all(_PART.fullmatch(p) and ".." not in p for p in parts):
            raise not_a_prefix(typed, "write hf://org/ or hf://org/model, without a revision")
        return tuple(p.lower() for p in parts), f"hf://{'/'.join(parts)}{'/' * (len(parts) < 2)}"

    def steps(self, url: str, _is_strict: object) -> Steps:
        """See `Grammar.steps`."""
        rest = url.partition("://")[2].lower()
        return tuple(part for part in re.split(r"[/@]", rest)[:2] if part)


def check_hub_id(text: str) -> None:
    """Raises Invalid unless `text` is the id of a Hub repository, `org/model`."""
    hub_location(text, text, None)


def hub_location(text: str, repo: str, revision: str | None) -> tuple[str, str | None]:
    """The location and the revision of a Hub ref. Raises Invalid, which quotes `text`, the user's text."""
    parts = repo.split("/")
    plain = all(_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    if len(parts) != 2 or not plain or repo.endswith(".git"):
        raise Invalid(
            f"{shown(text)} does not name a Hub model",
            code="bad_ref",
            hint="write hf://org/model or hf://org/model@revision; the two parts have letters, digits,"
            " '.', '_' and single '-'",
        )
    if revision is not None:
        _check_revision(repo, revision)
    return repo, revision


def folder_revision(path: str) -> tuple[str, str | None]:
    """The path of a repository's folder in a Hub cache, and the revision after its '@', if there is one.

    Any other path is returned as it is. Raises Invalid for a text that is no revision.
    """
    found = _IN_FOLDER.fullmatch(path)
    if not found:
        return path, None
    revision = unquote(found[2])
    _check_revision(found[1], revision)
    return found[1], revision


def _check_revision(repo: str, revision: str) -> None:
    if not _REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200:
        raise Invalid(
            f"revision {shown(revision)} of {repo} is not allowed",
            code="bad_revision",
            hint="give a branch, a tag, refs/pr/N or a commit of 40 digits; write '/' in a branch as %2F",
        )
    if re.fullmatch(r"[0-9a-f]{7,39}", revision):
        raise Invalid(
            f"revision {revision!r} of {repo} looks like a shortened commit",
            code="bad_revision",
            hint="give all 40 digits",
        )


def written(revision: str) -> str:
    """A revision as written in a ref. '/' becomes %2F, except in special ones: it would begin a path."""
    return revision if SPECIAL_REVISION.fullmatch(revision) else revision.replace("/", "%2F")
