"""The grammar of hf:// and ms:// refs: an organisation, a model, and perhaps a revision.

Repositories of another kind have it first: `datasets/org/name`, `kernels/org/name`.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import unquote

from cachd.errors import Invalid
from cachd.model.grammar import Located, Steps, not_a_prefix
from cachd.model.name import shown

KINDS = ("datasets", "kernels")  # of repositories that hold no models
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
SPECIAL_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)", re.ASCII)  # written with '/' in a ref
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORTENED = re.compile(r"[0-9a-f]{7,39}")  # as git shortens a commit; a branch may look like it: 20260102
HUB_FOLDER = re.compile(r"(?:models|datasets|spaces|kernels)--[^/@]+")  # a repository's folder in a Hub cache
_IN_FOLDER = re.compile(rf"(.*/{HUB_FOLDER.pattern})@([^@]+?)/*", re.DOTALL)
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*")


class HubGrammar:
    """`[KIND/]org/model[@revision]`. `scheme` is that of its refs. See `Grammar`."""

    kinds = KINDS
    has_host = False
    root = ""
    is_address = False

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def parse(self, text: str, rest: str) -> Located:
        """See `Grammar.parse`."""
        repo, at, revision = rest.partition("@")
        return Located(*hub_location(text, repo, revision.replace("%2F", "/") if at else None))

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """See `Grammar.prefix`. The Hub accepts a name in any case, and redirects to the right one."""
        parts = rest.removesuffix("/").split("/")
        most = 2 + (parts[0].lower() in KINDS)
        if len(parts) > most or not all(_PART.fullmatch(p) and ".." not in p for p in parts):
            hint = f"write {self._scheme}://org/ or {self._scheme}://org/model, without a revision"
            raise not_a_prefix(typed, hint)
        return tuple(
            p.lower() for p in parts
        ), f"{self._scheme}://{'/'.join(parts)}{'/' * (len(parts) < most)}"

    def steps(self, url: str, _is_strict: object) -> Steps:
        """See `Grammar.steps`."""
        parts = re.split(r"[/@]", url.partition("://")[2].lower())
        return tuple(part for part in parts[: 2 + (parts[0] in KINDS)] if part)


def check_hub_id(text: str) -> None:
    """Raises Invalid unless `text` is the id of a Hub repository: `org/model` or `KIND/org/name`."""
    hub_location(text, text, None)


def is_hub_id(text: str) -> bool:
    """Whether `text` is the id of a Hub repository: `org/model` or `KIND/org/name`."""
    try:
        check_hub_id(text)
    except Invalid:
        return False
    return True


def hub_location(text: str, repo: str, revision: str | None) -> tuple[str, str | None]:
    """The location and the revision of a Hub ref. Raises Invalid; the error quotes `text`."""
    parts = repo.split("/")
    if parts[0] in KINDS:
        parts = parts[1:]
    plain = all(_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    if len(parts) != 2 or not plain or repo.endswith(".git"):
        raise Invalid(
            f"{shown(text)} does not name a Hub model",
            code="bad_ref",
            hint="write org/model or org/model@revision; the two parts have letters, digits, '.', '_' and"
            " single '-'",
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
            hint="give a branch, a tag, refs/pr/N or a commit; write '/' in a branch as %2F",
        )


def written(revision: str) -> str:
    """A revision as written in a ref: with %2F for '/', which would begin a path. Special ones keep it."""
    return revision if SPECIAL_REVISION.fullmatch(revision) else revision.replace("/", "%2F")


def folder_of(repo: str) -> str:
    """The folder of a repository in the Hub view: `models--org--model`, `datasets--org--name`."""
    kind = "" if repo.partition("/")[0] in KINDS and repo.count("/") == 2 else "models--"
    return kind + repo.replace("/", "--")


def kind_and_repo(location: str) -> tuple[str, str]:
    """The kind of a repository in the singular, and its id without the kind: `dataset` and `org/name`."""
    first, _, rest = location.partition("/")
    return (first.removesuffix("s"), rest) if first in KINDS else ("model", location)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The LFS pointer file that stands for this content in git (git-lfs spec, "The Pointer")."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_pointer_id(sha256: str, size: int) -> str:
    """The git blob id of the LFS pointer file of this content."""
    pointer = lfs_pointer(sha256, size)
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False).hexdigest()
