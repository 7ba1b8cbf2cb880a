"""The nouns: frozen values that refuse nonsense when they are made."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from cachd.errors import Invalid

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
SCHEMES = ("hf", "s3", "https", "http", "file")

_NAME = re.compile(NAME_PATTERN)
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HEX_DIGITS = {
    "sha256": 64,
    "git-sha1": 40,
    "sha1": 40,
    "crc64nvme": 16,
    "crc32c": 8,
    "crc32": 8,
    "origin": 64,
}
_NAMES_CONTENT = frozenset({"sha256", "git-sha1", "sha1"})
_LONGEST_PATH = 1024
_LONGEST_COMPONENT = 255
_MOST_FILES = 100_000


def check_name(name: str) -> str:
    """`name` if it can name a model in the views, the API and a URL. Raises Invalid."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise Invalid(
            f"model name {name!r:.120} is not allowed",
            code="bad_name",
            mend=f"use 1 to 96 of letters, digits, '.', '_', '-', beginning with a letter or digit"
            f" and without '..' (pattern {NAME_PATTERN})",
        )
    return name


@dataclass(frozen=True, slots=True)
class Extent:
    """A half-open byte interval `[start, stop)`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"extent [{self.start}, {self.stop}) is not an interval of a file")

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Digest:
    """`algorithm:hex` of content.

    Algorithms: sha256; git-sha1 (SHA-1 of `blob <size>\\0` and the content); sha1, crc64nvme, crc32c and
    crc32 as S3 keeps them. `origin` is no digest of content: it names a blob whose content no strong
    digest names (see `File.blob`).
    """

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        digits = _HEX_DIGITS.get(self.algorithm)
        if digits is None:
            raise Invalid(f"digest algorithm {self.algorithm!r:.40} is not known", code="bad_digest")
        if len(self.hex) != digits or not set(self.hex) <= set("0123456789abcdef"):
            raise Invalid(
                f"{self.hex!r:.140} is not a {self.algorithm} digest",
                code="bad_digest",
                mend=f"give {digits} lower-case hexadecimal digits",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `algorithm:hex`; upper-case hex is folded. Raises Invalid."""
        algorithm, _, digits = text.partition(":")
        return cls(algorithm, digits.lower())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def names_content(self) -> bool:
        """Whether equal digests may be taken for equal bytes. A 64-bit checksum detects damage only."""
        return self.algorithm in _NAMES_CONTENT


@dataclass(frozen=True, slots=True)
class Ref:
    """What a user asks for, possibly movable.

    `hf://org/model[@revision]`, `s3://bucket/prefix/`, `https://host/file[#sha256=HEX]`, `https://host/dir/`
    or `file:///path`. `location` is everything between `://` and the revision or fragment.
    """

    scheme: str
    location: str
    revision: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a ref as a user writes it. Raises Invalid with the form that would be right."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in SCHEMES:
            raise Invalid(
                f"ref {_shown(text)} has no scheme that cachd knows",
                code="unknown_scheme",
                mend="use hf://org/model[@revision], s3://bucket/prefix/, https://host/file,"
                " https://host/dir/ or file:///path",
            )
        if len(text) > 2048 or any(unicodedata.category(c) in ("Cc", "Cf", "Cs") or c == "\\" for c in text):
            raise Invalid(
                f"ref {_shown(text)} holds characters that no ref has, or is longer than 2048",
                code="bad_ref",
                mend="write it in plain characters, percent-encoded where it is a URL",
            )
        if scheme == "hf":
            return cls(scheme, *_hub_location(text, rest))
        if scheme == "s3":
            return cls(scheme, _bucket_location(text, rest))
        return cls(scheme, *_url_location(text, scheme, rest))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        fragment = f"#{self.digest.algorithm}={self.digest.hex}" if self.digest else ""
        return f"{self.base}{revision}{fragment}"

    @property
    def base(self) -> str:
        """The ref without its movable part: what two revisions of a model have in common."""
        return f"{self.scheme}://{self.location}"

    @property
    def is_pinned(self) -> bool:
        """Whether the ref names one revision for ever: a Hub commit."""
        return self.scheme == "hf" and bool(self.revision and _COMMIT.fullmatch(self.revision))

    @property
    def default_name(self) -> str:
        """`org--model` for the Hub, the last path component elsewhere. Raises Invalid if that is no name."""
        if self.scheme == "hf":
            return check_name(self.location.replace("/", "--"))
        last = unquote(self.location.rstrip("/").rpartition("/")[2])
        try:
            return check_name(last)
        except Invalid as refusal:
            raise Invalid(
                f"the last part of {self.base} ({last!r:.120}) cannot be a model name",
                code="bad_name",
                mend="give a name of your own",
            ) from refusal


def _shown(text: str) -> str:
    """A rejected ref as an error may show it: no user, password, query or fragment, and not long."""
    head = re.split(r"[?#]", text, maxsplit=1)[0]
    return repr(re.sub(r"//[^/]*@", "//", head)[:120])


def _hub_location(text: str, rest: str) -> tuple[str, str | None]:
    repo, at, revision = rest.partition("@")
    parts = repo.split("/")
    plain = all(_HUB_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    if len(parts) != 2 or not plain or repo.endswith(".git"):
        raise Invalid(
            f"{_shown(text)} does not name a Hub model",
            code="bad_ref",
            mend="write hf://org/model or hf://org/model@revision; the two parts hold letters, digits,"
            " '.', '_' and single '-'",
        )
    good_revision = _HUB_REVISION.fullmatch(revision) and ".." not in revision and len(revision) <= 200
    if at and not good_revision:
        raise Invalid(
            f"revision {revision!r:.120} of {repo} is not allowed",
            code="bad_revision",
            mend="give a branch, a tag, refs/pr/N or a full 40-digit commit",
        )
    if re.fullmatch(r"[0-9a-f]{7,39}", revision):
        raise Invalid(
            f"revision {revision!r} of {repo} looks like a shortened commit",
            code="bad_revision",
            mend="give all 40 digits",
        )
    return repo, revision or None


def _bucket_location(text: str, rest: str) -> str:
    bucket, slash, prefix = rest.partition("/")
    parts = prefix.rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket) or not slash or not prefix.strip("/") or not _is_clean(parts):
        raise Invalid(
            f"{_shown(text)} does not name objects of a bucket",
            code="bad_ref",
            mend="write s3://bucket/prefix/ (or s3://bucket/key for one object), without '..' or '//'",
        )
    return rest


def _url_location(text: str, scheme: str, rest: str) -> tuple[str, None, Digest | None]:
    try:
        url = urlsplit(f"{scheme}://{rest}")
        port = url.port
    except ValueError as error:
        raise Invalid(f"{_shown(text)} is not a URL: {error}", code="bad_ref", mend="check it") from error
    if "@" in url.netloc:
        raise Invalid(
            f"{_shown(text)} carries a user or password",
            code="url_secrets",
            mend="leave them out: a ref is shown in listings and files",
        )
    if url.query:
        raise Invalid(
            f"{_shown(text)} carries a query",
            code="url_query",
            mend="leave it out: queries hold signatures, and a ref is shown in listings and files",
        )
    digest = None
    if url.fragment:
        algorithm, _, digits = url.fragment.partition("=")
        if algorithm != "sha256":
            raise Invalid(
                f"fragment of {_shown(text)} is not a digest", code="bad_ref", mend="write #sha256=HEX"
            )
        digest = Digest(algorithm, digits.lower())
    parts = unquote(url.path).strip("/").split("/")
    if (scheme == "file") == bool(url.netloc) or not parts[0] or not _is_clean(parts):
        raise Invalid(
            f"{_shown(text)} does not name a file or directory",
            code="bad_ref",
            mend="write https://host/file, https://host/dir/ or file:///path, without '..' or '//'",
        )
    host = (url.hostname or "") if url.hostname is None or ":" not in url.hostname else f"[{url.hostname}]"
    return f"{host}{f':{port}' if port else ''}{url.path}", None, digest


def _is_clean(parts: Iterable[str]) -> bool:
    return all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in parts)


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model at one revision.

    `path`: where it lies in the model, with '/'. `size`: bytes. `origin`: where its source keeps it,
    without any secret. `digest`: what the source says of its content, None when it says nothing.
    `validator`: the source's change mark for it, None when the origin is immutable by itself.
    """

    path: str
    size: int
    origin: str
    digest: Digest | None = None
    validator: str | None = None

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.size < 0:
            raise Invalid(f"{self.path}: size {self.size} is negative", code="bad_manifest")

    @property
    def blob(self) -> Digest:
        """The name of its blob: the digest where that names content, else a name for exactly this origin
        under exactly this validator, so that a weak checksum never makes two files one."""
        if self.digest is not None and self.digest.names_content:
            return self.digest
        told = [self.origin, self.size, self.validator, str(self.digest or "")]
        return Digest("origin", hashlib.sha256(json.dumps(told).encode()).hexdigest())


def check_path(path: str) -> str:
    """`path` if it stays inside a model's directory on every system that reads it. Raises Invalid."""
    parts = path.split("/")
    reason = ""
    if not path or path.startswith("/") or not _is_clean(parts) or re.match(r"[A-Za-z]:", path):
        reason = "it leaves the model's directory or is not relative"
    elif any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in path):
        reason = "it holds control or invisible characters"
    elif len(path.encode()) > _LONGEST_PATH or any(len(p.encode()) > _LONGEST_COMPONENT for p in parts):
        reason = f"it is longer than {_LONGEST_PATH} bytes, or a part of it than {_LONGEST_COMPONENT}"
    if reason:
        raise Invalid(
            f"file name {path[:120]!r} of the source is refused: {reason}",
            code="unsafe_path",
            mend="the whole model is refused; report the name to whoever keeps the source",
        )
    return path


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a model at one revision, sorted by path.

    `base` is the ref without its movable part, `revision` the immutable id it resolved to: 40 hex digits
    from the Hub, 64 elsewhere.
    """

    base: str
    revision: str
    files: tuple[File, ...]
    id: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.files:
            raise Invalid(
                f"{self.base} holds no files",
                code="no_files",
                mend="check the name; nothing can be served from it",
            )
        if len(self.files) > _MOST_FILES:
            raise Invalid(f"{self.base} lists {len(self.files)} files", code="too_many_files")
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda f: f.path)))
        paths = [f.path for f in self.files]
        folders = {p[:i] for p in paths for i, c in enumerate(p) if c == "/"}
        if len(set(paths)) != len(paths) or folders & set(paths):
            seen = Counter(paths)
            twice = next((p for p in paths if seen[p] > 1 or p in folders), "")
            raise Invalid(
                f"{self.base} lists {twice!r} twice, or as a file and a directory",
                code="bad_manifest",
                mend="the listing contradicts itself; report it to whoever keeps the source",
            )
        told = [self.base, self.revision, [[f.path, f.size, str(f.blob)] for f in self.files]]
        object.__setattr__(self, "id", hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32])

    @property
    def size(self) -> int:
        """Bytes of all files, equal content counted once."""
        return sum({f.blob: f.size for f in self.files}.values())

    @property
    def is_verified(self) -> bool:
        """Whether the source publishes a digest of every file."""
        return all(f.digest is not None for f in self.files)

    def select(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> Manifest:
        """The files that match any of `include` (all when empty) and none of `exclude`. Raises Invalid.

        Patterns are those of a shell and match the whole path; `*` crosses '/', and `dir/` means all below.
        """

        def matches(path: str, patterns: tuple[str, ...]) -> bool:
            return any(fnmatchcase(path, p + "*" if p.endswith("/") else p) for p in patterns)

        kept = tuple(
            f
            for f in self.files
            if (not include or matches(f.path, include)) and not matches(f.path, exclude)
        )
        if not kept:
            raise Invalid(
                f"none of the {len(self.files)} files of {self.base} passes include and exclude",
                code="nothing_selected",
                mend="loosen the patterns; they match whole paths, and '*' crosses '/'",
            )
        return Manifest(self.base, self.revision, kept)

    def as_document(self) -> dict[str, object]:
        """The manifest as JSON members, read back by `from_document`."""
        files = [
            {
                "path": f.path,
                "size": f.size,
                "origin": f.origin,
                "digest": str(f.digest) if f.digest else None,
                "validator": f.validator,
            }
            for f in self.files
        ]
        return {"base": self.base, "revision": self.revision, "files": files}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read what `as_document` wrote. Raises Invalid, KeyError or TypeError on anything else."""
        files = document["files"]
        if not isinstance(files, list):
            raise Invalid("a manifest's files are no list", code="bad_manifest")
        return cls(
            base=str(document["base"]),
            revision=str(document["revision"]),
            files=tuple(
                File(
                    path=f["path"],
                    size=f["size"],
                    origin=f["origin"],
                    digest=Digest.parse(f["digest"]) if f["digest"] else None,
                    validator=f["validator"],
                )
                for f in files
            ),
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asked for: a ref under a name, narrowed by patterns. Two equal wishes are one pull."""

    ref: Ref
    name: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)

    def as_document(self) -> dict[str, object]:
        """The wish as JSON members, read back by `from_document`."""
        return {
            "ref": str(self.ref),
            "name": self.name,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read what `as_document` wrote. Raises Invalid, KeyError or TypeError on anything else."""
        include, exclude = document["include"], document["exclude"]
        if not isinstance(include, list) or not isinstance(exclude, list):
            raise Invalid("include and exclude are lists of patterns", code="invalid")
        return cls(Ref.parse(str(document["ref"])), str(document["name"]), tuple(include), tuple(exclude))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One manifest whose blobs are all here, under a name, declared ready.

    `manifest` is the manifest's id, `size` its bytes, `files` their count, `published_at` seconds since
    the epoch, `commit` the 40 digits and `repo` the id that name it in the Hub view.
    """

    wish: Wish
    manifest: str
    revision: str
    size: int
    files: int
    verified: bool
    published_at: float
    repo: str
    commit: str

    @property
    def name(self) -> str:
        return self.wish.name

    @property
    def hub_folder(self) -> str:
        """Its folder in the Hub view: `models--org--model`."""
        return "models--" + self.repo.replace("/", "--")

    @property
    def hub_revision(self) -> str | None:
        """The movable revision a Hub client would ask for, None when the wish names a commit."""
        return None if self.wish.ref.is_pinned else self.wish.ref.revision or "main"


def snapshot_of(wish: Wish, manifest: Manifest, published_at: float) -> Snapshot:
    """What publishing `manifest` under the wish's name declares."""
    return Snapshot(
        wish=wish,
        manifest=manifest.id,
        revision=manifest.revision,
        size=manifest.size,
        files=len(manifest.files),
        verified=manifest.is_verified,
        published_at=published_at,
        repo=wish.ref.location if wish.ref.scheme == "hf" else wish.name,
        commit=commit_of(manifest),
    )


def commit_of(manifest: Manifest) -> str:
    """The 40 digits that stand for the manifest's revision in the Hub view."""
    return manifest.revision[:40]


def quoted(path: str) -> str:
    """`path` as the path of a URL, '/' kept."""
    return quote(path, safe="/")
