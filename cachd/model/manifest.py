"""Defines the manifest: every file of a model at one revision."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from cachd.errors import Invalid
from cachd.model.digest import STRENGTHS, Digest
from cachd.model.finding import Finding, findings_of
from cachd.model.folders import check_folders
from cachd.model.name import check_path
from cachd.model.optional import OPTIONAL, absent
from cachd.model.selection import LeftOut, Unusable, matches
from cachd.model.triton import VERSION, check_layout, place_of
from cachd.model.units import count_text
from cachd.model.weights import choices, gguf_models

MAX_FILES = 100_000
UNVERIFIED = "none"
MAX_LETTERS = 32_000_000  # characters in all paths, origins and validators together
_LONGEST_VALIDATOR = 512
_MAX_FORMS = 60  # forms of weights in what was left out
_MAX_ADVISED = 12
# The version of the JSON document. In a document without one, a sha1 or git-sha1 names a blob that all
# sources share.
_VERSION = 2
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a revision is a directory name in the Hub view


class Entries:
    """Counts the files and characters of a listing while it is read, and refuses one that is too long."""

    def __init__(self, base: str, max_files: int = MAX_FILES) -> None:
        self._base, self._max_files = base, max_files
        self._count, self._letters = 0, 0

    def add(self, *texts: str) -> None:
        """Count one more file and the characters of its strings. Raises Invalid when there are too many."""
        self._count += 1
        for text in texts:
            self._letters += len(text)
        if self._count > self._max_files:
            self._refuse(f"{self._count} files or more", f"{self._max_files}")
        if self._letters > MAX_LETTERS:
            self._refuse(f"names of {self._letters} characters or more", f"{MAX_LETTERS}")

    def _refuse(self, found: str, most: str) -> None:
        raise Invalid(
            f"{self._base} lists {found}, and at most {most} are allowed",
            code="too_many_files",
            hint="ask for a part of it with a longer prefix",
        )


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model at one revision.

    `path`: its path in the model, with '/'. `size`: bytes. `origin`: its place at the source, without any
    secret. `digest`: the digest that the source states, None if it states none. `validator`: a value
    that changes whenever the content at the source changes, such as an ETag; None if the origin is immutable.
    `base`: the ref without its revision; the manifest sets it. `sha256`: the digest that cachd computed; None
    before it did. `kept`: the blob that holds the content, if that blob is not named after the other fields:
    an older version named it, or another file has the same content.

    `stated` identifies the content: it is the source's digest if that is strong enough, else a hash of the
    origin, the size, the validator and any weaker digest. Two files of one base with equal `stated` share one
    blob. `blob` is the name of the blob. Sources share a blob only if they state its sha256, because a source
    may lie and all weaker digests have collisions. Any other blob belongs to one source, except a `kept` one.
    """

    path: str
    size: int
    origin: str
    digest: Digest | None = None
    validator: str | None = None
    base: str = ""
    sha256: Digest | None = field(default=None, compare=False)
    kept: Digest | None = field(default=None, compare=False)
    stated: Digest = field(init=False, compare=False)
    blob: Digest = field(init=False, compare=False)

    def __post_init__(self) -> None:
        check_path(self.path)
        if type(self.size) is not int or self.size < 0:
            raise Invalid(f"{self.path}: {self.size!r:.40} is not a size in bytes", code="bad_manifest")
        if self.validator and len(self.validator) > _LONGEST_VALIDATOR:
            raise Invalid(
                f"{self.path} has a validator of {len(self.validator)} characters",
                code="bad_manifest",
                hint=f"at most {_LONGEST_VALIDATOR} are allowed; report it to the operator of the source",
            )
        stated, own = self._names()
        object.__setattr__(self, "stated", stated)
        object.__setattr__(self, "blob", self.kept or own)

    def _names(self) -> tuple[Digest, Digest]:
        """The value of `stated`, and the name of the blob as computed from the fields."""
        digest = self.digest
        if digest is not None and digest.names_content:
            return digest, digest
        if digest is not None and digest.names_content_of_a_source:
            # The base and not the origin, which contains the revision: an unchanged file must keep its blob
            # in the next revision.
            return digest, _private(f"{self.base or self.origin}\n{self.size}\n{digest}")
        mark = _private(json.dumps([self.origin, self.size, self.validator, str(digest or "")]))
        return mark, mark

    @property
    def is_private(self) -> bool:
        """Whether its blob belongs to this source alone."""
        return self.kept is None and not self.is_named_by_content

    @property
    def is_named_by_content(self) -> bool:
        """Whether its source states a sha256."""
        return self.digest is not None and self.digest.names_content

    @property
    def known_sha256(self) -> Digest | None:
        """The sha256 of its content that the source states or cachd computed before; None if not known."""
        return self.digest if self.is_named_by_content else self.sha256

    @property
    def verified_by(self) -> str:
        """The algorithm of the digest that verifies its bytes; `none` if the source states no digest."""
        return self.digest.algorithm if self.digest else UNVERIFIED


def _private(identity: str) -> Digest:
    """The name of a blob that belongs to one source."""
    return Digest("origin", hashlib.sha256(identity.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a model at one revision, sorted by path.

    `base` is the ref without its revision. `revision` is the immutable id that the ref resolved to: 40 hex
    digits from the Hub, 64 elsewhere. `id` is a hash of the base, the revision and the selected files. `size`
    is the bytes of all files; equal content counts once. `verified_by` says how many files each algorithm
    verifies, the weakest first; `none` counts files without a digest. `left_out`: counts the files of the
    source that were not selected; None if all were. `warnings`: what is odd about the model, for people.
    `findings`: what a preflight found wrong with it.
    `renamed_to`: the location to which the Hub redirects requests for `base`, if it does. `unusable`: entries
    of the source that cannot be files; `select` raises their error unless the patterns leave them out. They
    are not recorded. `lacks`: what `absent` is if files of the source may have been left out; else None.
    `copied`: the paths that the views show as copies, not as links. `layout`: where the plain view has the
    files (triton.py); None: where the source has them. It is part of the id.
    """

    base: str
    revision: str
    files: tuple[File, ...]
    left_out: LeftOut | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)
    renamed_to: str | None = field(default=None, compare=False)
    findings: tuple[Finding, ...] = field(default=(), compare=False)
    unusable: tuple[Unusable, ...] = field(default=(), compare=False)
    lacks: tuple[str, ...] | None = field(default=None, compare=False)
    copied: tuple[str, ...] = field(default=(), compare=False)
    layout: str | None = None
    id: str = field(init=False)
    size: int = field(init=False)
    verified_by: tuple[tuple[str, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not _REVISION.fullmatch(self.revision):
            raise Invalid(
                f"{self.base} resolved to {self.revision!r:.80}, which is neither a commit nor a digest",
                code="bad_manifest",
                hint="report it to the operator of the source",
            )
        if not self.files:
            raise Invalid(
                f"{self.base} contains no files",
                code="no_files",
                hint="check the name",
            )
        entries = Entries(self.base)
        for file in self.files:
            entries.add(file.path, file.origin, file.validator or "")
        own = (f if f.base == self.base else replace(f, base=self.base) for f in self.files)
        object.__setattr__(self, "files", tuple(sorted(own, key=lambda f: f.path)))
        self._check_paths()
        files = [[f.path, f.size, str(f.stated)] for f in self.files]
        identity = [self.base, self.revision, files, *([self.layout] if self.layout else [])]
        sizes = {f.stated: f.size for f in self.files}
        if any(sizes[f.stated] != f.size for f in self.files):
            raise Invalid(f"{self.base} lists one digest with two sizes", code="bad_manifest")
        object.__setattr__(self, "size", sum(sizes.values()))
        object.__setattr__(self, "id", hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32])
        counts = Counter([f.verified_by for f in self.files])
        verified_by = tuple((each, counts[each]) for each in (UNVERIFIED, *STRENGTHS) if each in counts)
        object.__setattr__(self, "verified_by", verified_by)

    def _check_paths(self) -> None:
        """Raises Invalid when two files have one path, or a file has the path of a directory."""
        sizes = {f.path: f.size for f in self.files}
        if len(sizes) != len(self.files):
            seen = Counter(f.path for f in self.files)
            twice = next(path for path, count in seen.items() if count > 1)
            raise Invalid(
                f"{self.base} lists {twice!r} twice",
                code="bad_manifest",
                hint="report it to the operator of the source",
            )
        check_folders(self.base, sizes)

    @property
    def has_all_digests(self) -> bool:
        """Whether the source states a digest of every file."""
        return self.verified_by[0][0] != UNVERIFIED

    def place_of(self, path: str) -> str:
        """Where the plain view has a file, relative to the model's directory."""
        return place_of(path, self.layout)

    @property
    def below(self) -> str:
        """The directory of the plain view, as `/1`, below which files have their own paths; else empty."""
        return f"/{VERSION}" if self.layout else ""

    @property
    def single_file(self) -> str | None:
        """The path of the model's only file. None if there are several.

        If all files are the shards of one GGUF, it is the path of the first one: inference servers that take
        one file find the other shards from there.
        """
        return _one_of([f.path for f in self.files])

    @property
    def single_gguf(self) -> str | None:
        """As `single_file`, but only GGUF files count; projectors do not."""
        return _one_of(gguf_models(f.path for f in self.files))

    def select(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> Manifest:
        """The manifest of the files that match any of `include` (empty: all) and none of `exclude`.

        Shell patterns match the complete path: `*` also matches '/', and `dir/` all files below it. Raises
        Invalid when no file is left. If the patterns do not leave out an entry of `unusable`, its error is
        raised.
        """
        for each in self.unusable:
            each.check(include, exclude)
        if not include and not exclude:
            return self

        kept = tuple(
            f
            for f in self.files
            if (not include or matches(f.path, include)) and not matches(f.path, exclude)
        )
        if not kept:
            raise Invalid(
                f"include and exclude select no file of {self.base},"
                f" which has {count_text(len(self.files), 'file')}",
                code="nothing_selected",
                hint="change the patterns: they match complete paths, '*' matches '/', 'dir/' all below it",
            )
        return self.only(kept)

    def only(self, files: Iterable[File]) -> Manifest:
        """The same manifest with only these files."""
        kept = tuple(files)
        return self if len(kept) == len(self.files) else replace(self, files=kept)

    def without(self, source: Manifest) -> Manifest:
        """The same manifest. Its `left_out` counts the files of `source` that it lacks."""
        is_complete = len(source.files) == len(self.files)
        if is_complete and not source.unusable:
            return self
        lacks = absent({f.path for f in source.files}, [each.path for each in source.unusable])
        if is_complete:
            return replace(self, lacks=lacks)
        kept = {f.path for f in self.files}
        gone = [f.path for f in source.files if f.path not in kept]
        left_out = LeftOut(len(gone), source.size - self.size, tuple(choices(gone)[:_MAX_FORMS]))
        return replace(self, left_out=left_out, lacks=lacks)

    @property
    def absent(self) -> tuple[str, ...]:
        """The well-known optional files that the complete revision does not have; none if that is not known.

        It is not known of a manifest that an older version of cachd recorded with `left_out`.
        """
        if self.lacks is not None:
            return self.lacks
        return () if self.left_out else absent({f.path for f in self.files})

    @property
    def advice(self) -> str | None:
        """Tells people how to pull less. None unless the model has its weights in several forms."""
        there = [] if self.left_out else choices(f.path for f in self.files)
        if len(there) < 2:
            return None
        more = f" and {len(there) - _MAX_ADVISED} more" if len(there) > _MAX_ADVISED else ""
        return (
            f"the source has its weights in {len(there)} forms: {', '.join(there[:_MAX_ADVISED])}{more};"
            " one is enough for most engines (weights, --weights)"
        )

    def as_document(self, hashes: Mapping[str, Digest] = MappingProxyType({})) -> dict[str, object]:
        """The manifest as JSON, for `from_document`. `hashes`: the computed sha256 of files, by path."""
        files = [
            {
                "path": f.path,
                "size": f.size,
                "origin": f.origin,
                "digest": str(f.digest) if f.digest else None,
                "validator": f.validator,
                **({"sha256": sha256.hex} if (sha256 := hashes.get(f.path, f.sha256)) else {}),
                **({"blob": str(f.kept)} if f.kept else {}),
            }
            for f in self.files
        ]
        return {
            "version": _VERSION,
            "base": self.base,
            "revision": self.revision,
            "files": files,
            **({"left_out": self.left_out.as_document()} if self.left_out else {}),
            **({"absent": list(self.lacks)} if self.lacks is not None else {}),
            **({"copied": list(self.copied)} if self.copied else {}),
            **({"layout": self.layout} if self.layout else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({"renamed_to": self.renamed_to} if self.renamed_to else {}),
            **({"preflight": [each.as_document() for each in self.findings]} if self.findings else {}),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read the result of `as_document`, of this version or none.

        Raises Invalid, KeyError or TypeError for anything else.
        """
        files, base = document["files"], str(document["base"])
        if not isinstance(files, list):
            raise Invalid("the files of a manifest must be a list", code="bad_manifest")
        if (version := document.get("version", _VERSION)) != _VERSION:
            raise Invalid(f"the manifest has version {version!r:.20}, not {_VERSION}", code="bad_manifest")
        read = _file if "version" in document else _file_of_unversioned
        left_out: Any = document.get("left_out")
        warnings: Any = document.get("warnings", [])
        renamed_to = document.get("renamed_to")
        lacks: Any = document.get("absent")
        copied: Any = document.get("copied", [])
        return cls(
            base,
            str(document["revision"]),
            tuple(read(f, base) for f in files),
            LeftOut.from_document(left_out),
            tuple(str(warning) for warning in warnings),
            str(renamed_to) if renamed_to else None,
            findings_of(document),
            copied=tuple(_text(path) for path in copied),
            layout=check_layout(document.get("layout")),
            lacks=None if lacks is None else tuple(each for each in OPTIONAL if each in lacks),
        )


def _one_of(paths: Sequence[str]) -> str | None:
    """See `Manifest.single_file`. `paths` is sorted."""
    split = re.fullmatch(r"(.*-)00001(-of-([0-9]{5})\.gguf)", paths[0], re.DOTALL) if paths else None
    shards = [f"{split[1]}{n:05}{split[2]}" for n in range(1, int(split[3]) + 1)] if split else []
    return paths[0] if len(paths) == 1 or (shards and paths == shards) else None


def _file(document: Mapping[str, Any], base: str) -> File:
    return File(
        path=_text(document["path"]),
        size=document["size"],
        origin=_text(document["origin"]),
        digest=Digest.parse(str(document["digest"])) if document["digest"] else None,
        validator=None if document["validator"] is None else _text(document["validator"]),
        base=base,
        sha256=Digest("sha256", str(document["sha256"])) if "sha256" in document else None,
        kept=Digest.parse(str(document["blob"])) if "blob" in document else None,
    )


def _file_of_unversioned(document: Mapping[str, Any], base: str) -> File:
    """A file of a document without a version, in which sha1 and git-sha1 also name blobs."""
    file = _file(document, base)
    named = file.digest is not None and file.digest.names_content_of_a_source
    return replace(file, kept=file.digest) if named and file.is_private else file


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value
