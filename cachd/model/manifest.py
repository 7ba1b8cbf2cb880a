"""Manifests: every file of a model at one revision."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Self

from cachd.errors import Invalid
from cachd.model.digest import Digest
from cachd.model.name import check_path

MOST_FILES = 100_000
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # it names a directory of the Hub view


def check_count(base: str, files: int) -> None:
    """Raises Invalid when a model has more files than cachd takes: asked before anything is done for each."""
    if files > MOST_FILES:
        raise Invalid(
            f"{base} lists {files} files or more, and {MOST_FILES} are the most",
            code="too_many_files",
            mend="ask for a part of it by a longer prefix",
        )


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model at one revision.

    `path`: where it lies in the model, with '/'. `size`: bytes. `origin`: where its source keeps it,
    without any secret. `digest`: what the source says of its content, None when it says nothing.
    `validator`: the source's change mark for it, None when the origin is immutable by itself.

    `blob` names its blob: the digest where that names content, else a name for exactly this origin under
    exactly this validator, so that a weak checksum never makes two files one.
    """

    path: str
    size: int
    origin: str
    digest: Digest | None = None
    validator: str | None = None
    blob: Digest = field(init=False)

    def __post_init__(self) -> None:
        check_path(self.path)
        if type(self.size) is not int or self.size < 0:
            raise Invalid(f"{self.path}: {self.size!r:.40} is not a size in bytes", code="bad_manifest")
        object.__setattr__(self, "blob", self._blob())

    @property
    def sha256(self) -> Digest | None:
        """The sha256 of its content, as far as it is known without reading it."""
        return next((d for d in (self.digest, self.blob) if d and d.algorithm == "sha256"), None)

    def _blob(self) -> Digest:
        if self.digest is not None and self.digest.names_content:
            return self.digest
        told = [self.origin, self.size, self.validator, str(self.digest or "")]
        return Digest("origin", hashlib.sha256(json.dumps(told).encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a model at one revision, sorted by path.

    `base` is the ref without its movable part, `revision` the immutable id it resolved to: 40 hex digits
    from the Hub, 64 elsewhere. `id` names exactly this base, revision and choice of files; `size` is the
    bytes of all files, equal content counted once.
    """

    base: str
    revision: str
    files: tuple[File, ...]
    id: str = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        if not _REVISION.fullmatch(self.revision):
            raise Invalid(
                f"{self.base} resolved to {self.revision!r:.80}, which is no commit or digest",
                code="bad_manifest",
                mend="report it to whoever keeps the source",
            )
        if not self.files:
            raise Invalid(
                f"{self.base} holds no files",
                code="no_files",
                mend="check the name; nothing can be served from it",
            )
        check_count(self.base, len(self.files))
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
        sizes = {f.blob: f.size for f in self.files}
        if any(sizes[f.blob] != f.size for f in self.files):
            raise Invalid(f"{self.base} lists one digest with two sizes", code="bad_manifest")
        object.__setattr__(self, "size", sum(sizes.values()))
        object.__setattr__(self, "id", hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32])

    @property
    def is_verified(self) -> bool:
        """Whether the source publishes a digest of every file."""
        return all(f.digest is not None for f in self.files)

    @property
    def single_file(self) -> str | None:
        """The path of the model's only file, or of the first shard when the files are one split GGUF.

        An engine that takes one file is given this one: it finds the other shards by itself. None for any
        other model.
        """
        paths = [f.path for f in self.files]
        split = re.fullmatch(r"(.*-)00001(-of-([0-9]{5})\.gguf)", paths[0], re.DOTALL)
        shards = [f"{split[1]}{n:05}{split[2]}" for n in range(1, int(split[3]) + 1)] if split else []
        return paths[0] if len(paths) == 1 or paths == shards else None

    def select(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> Manifest:
        """The files that match any of `include` (all when empty) and none of `exclude`. Raises Invalid.

        Patterns are those of a shell and match the whole path; `*` crosses '/', and `dir/` means all below.
        """

        if not include and not exclude:
            return self

        kept = tuple(
            f
            for f in self.files
            if (not include or matches(f.path, include)) and not matches(f.path, exclude)
        )
        if not kept:
            raise Invalid(
                f"none of the {len(self.files)} files of {self.base} passes include and exclude",
                code="nothing_selected",
                mend="loosen the patterns; they match whole paths, '*' crosses '/', a directory ends in '/'",
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
                    path=_text(f["path"]),
                    size=f["size"],
                    origin=f["origin"],
                    digest=Digest.parse(str(f["digest"])) if f["digest"] else None,
                    validator=f["validator"],
                )
                for f in files
            ),
        )


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path matches one of the patterns, as `Manifest.select` reads them."""
    return any(fnmatchcase(path, p + "*" if p.endswith("/") else p) for p in patterns)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value
