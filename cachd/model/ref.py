"""Defines the ref: the address of a model at its source, and what it may contain."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from cachd.errors import Invalid
from cachd.model.digest import Digest
from cachd.model.name import has_invisible, is_clean, shown

Scheme = Literal["hf", "s3", "https", "http", "file"]
SCHEMES: tuple[str, ...] = get_args(Scheme)

_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
SPECIAL_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)", re.ASCII)  # may contain '/'
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Ref:
    """The address of a model or a file at its source, possibly at a revision that moves, such as a branch.

    `hf://org/model[@revision]`, `s3://bucket/prefix/`, `https://host/file[#sha256=HEX]`, `https://host/dir/`
    or `file:///path`. `location` is the text between `://` and the revision or fragment. Users may type more
    forms: see `Typed`.
    """

    scheme: str
    location: str
    revision: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the result of `str` of a ref. Raises Invalid with the right form."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in SCHEMES:
            raise Invalid(
                f"ref {shown(text)} has no scheme that cachd knows",
                code="unknown_scheme",
                hint="use hf://org/model[@revision], s3://bucket/prefix/, https://host/file,"
                " https://host/dir/ or file:///path",
            )
        check_characters(text)
        if scheme == "hf":
            repo, at, revision = rest.partition("@")
            return cls(scheme, *hub_location(text, repo, revision.replace("%2F", "/") if at else None))
        if scheme == "s3":
            return cls(scheme, _bucket_location(text, rest))
        return cls(scheme, *_url_location(text, scheme, rest))

    def __str__(self) -> str:
        revision = f"@{_written(self.revision)}" if self.revision else ""
        fragment = f"#{self.digest.algorithm}={self.digest.hex}" if self.digest else ""
        return f"{self.base}{revision}{fragment}"

    @property
    def base(self) -> str:
        """The ref without revision and fragment: what all revisions of a model have in common."""
        return f"{self.scheme}://{self.location}"

    @property
    def is_pinned(self) -> bool:
        """Whether the ref names one revision that never moves: a Hub commit."""
        return self.scheme == "hf" and bool(self.revision and _COMMIT.fullmatch(self.revision))


def check_characters(text: str) -> None:
    """Raises Invalid if `text` has characters that no ref may have, or is too long."""
    if len(text) > 2048 or "\\" in text or has_invisible(text):
        raise Invalid(
            f"ref {shown(text)} has characters that no ref may have, or more than 2048 characters",
            code="bad_ref",
            hint="write it in plain characters, percent-encoded if it is a URL",
        )


def check_hub_id(text: str) -> None:
    """Raises Invalid unless `text` is the id of a Hub repository, `org/model`."""
    hub_location(text, text, None)


def hub_location(text: str, repo: str, revision: str | None) -> tuple[str, str | None]:
    """The location and the revision of a Hub ref. Raises Invalid, which quotes `text`, the user's text."""
    parts = repo.split("/")
    plain = all(_HUB_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    if len(parts) != 2 or not plain or repo.endswith(".git"):
        raise Invalid(
            f"{shown(text)} does not name a Hub model",
            code="bad_ref",
            hint="write hf://org/model or hf://org/model@revision; the two parts have letters, digits,"
            " '.', '_' and single '-'",
        )
    if revision is None:
        return repo, None
    if not _HUB_REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200:
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
    return repo, revision


def _written(revision: str) -> str:
    """A Hub revision as written in a ref. '/' becomes %2F, except in special ones: it would begin a path."""
    return revision if SPECIAL_REVISION.fullmatch(revision) else revision.replace("/", "%2F")


def _bucket_location(text: str, rest: str) -> str:
    bucket, slash, prefix = rest.partition("/")
    parts = prefix.rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket) or not slash or not prefix.strip("/") or not is_clean(parts):
        raise Invalid(
            f"{shown(text)} does not name objects of a bucket",
            code="bad_ref",
            hint="write s3://bucket/prefix/ (or s3://bucket/key for one object), without '..' or '//'",
        )
    return rest


def _url_location(text: str, scheme: str, rest: str) -> tuple[str, None, Digest | None]:
    try:
        url = urlsplit(f"{scheme}://{rest}")
        port = url.port
    except ValueError as error:
        raise Invalid(f"{shown(text)} is not a URL: {error}", code="bad_ref", hint="check it") from error
    if "@" in url.netloc:
        raise Invalid(
            f"{shown(text)} contains a user or password",
            code="url_secrets",
            hint="leave them out: a ref is shown in listings and files",
        )
    if url.query:
        raise Invalid(
            f"{shown(text)} contains a query",
            code="url_query",
            hint="leave it out: it may be a signature, and a ref is shown in listings and files",
        )
    digest = None
    if url.fragment:
        algorithm, _, digits = url.fragment.partition("=")
        if algorithm != "sha256":
            raise Invalid(
                f"the fragment of {shown(text)} is not a digest", code="bad_ref", hint="write #sha256=HEX"
            )
        digest = Digest(algorithm, digits.lower())
        if url.path.endswith("/"):
            raise Invalid(
                f"{shown(text)} is a directory, but a digest belongs to one file",
                code="bad_ref",
                hint="leave the fragment out: the digests come from SHA256SUMS in the directory",
            )
    parts = unquote(url.path).strip("/").split("/")
    if (scheme == "file") == bool(url.netloc) or not parts[0] or not is_clean(parts):
        raise Invalid(
            f"{shown(text)} does not name a file or directory",
            code="bad_ref",
            hint="write https://host/file, https://host/dir/ or file:///path, without '..' or '//'",
        )
    host = (url.hostname or "") if url.hostname is None or ":" not in url.hostname else f"[{url.hostname}]"
    return f"{host}{f':{port}' if port else ''}{url.path}", None, digest
