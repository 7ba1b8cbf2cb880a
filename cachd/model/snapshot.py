"""ModelSpecs, and the snapshots that make them true."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Self

from cachd.errors import Invalid
from cachd.model.default_name import default_name
from cachd.model.manifest import Manifest
from cachd.model.name import check_name, check_path, check_patterns
from cachd.model.ref import Ref, check_hub_id
from cachd.model.typed import Typed

_ID_DIGITS = 8  # of a manifest's id, in an address
_HEX = re.compile(r"[0-9a-f]{32,64}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a user asked for: a ref under a name, narrowed by patterns. Two equal pending are one pull.

    `hub_id`: the repository of the Hub, `org/model`, that a mirror elsewhere stands for in the Hub view.
    """

    ref: Ref
    name: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hub_id: str | None = None

    def __post_init__(self) -> None:
        """Raises Invalid: all of these are kept, listed and shown."""
        check_name(self.name)
        check_patterns(self.include, "include")
        check_patterns(self.exclude, "exclude")
        if self.hub_id is None:
            return
        if self.ref.scheme == "hf":
            raise Invalid(
                f"{self.ref} is of the Hub, and hub_id names {self.hub_id[:120]!a}",
                code="bad_hub_id",
                hint="leave hub_id out: a model of the Hub has its own folder in the Hub view",
            )
        check_hub_id(self.hub_id)

    @classmethod
    def asked(
        cls,
        ref: str,
        name: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        hub_id: str | None = None,
    ) -> Self:
        """Read a request as a user writes it; without a name it gets the default one. Raises Invalid."""
        typed = Typed.parse(ref)
        if typed.path and include:
            raise Invalid(
                f"the ref names {typed.path:.120}, and include names other files",
                code="bad_ref",
                hint="name all files in include and none in the ref, or leave include out",
            )
        include = [escape(typed.path)] if typed.path else include
        if name is None:
            name = default_name(typed.ref, include, exclude)
        return cls(typed.ref, name, tuple(include), tuple(exclude), hub_id)

    def is_of_same_model(self, other: ModelSpec) -> bool:
        """Whether both ask for the same files of one model, if perhaps at other revisions."""
        return self._model == other._model

    @property
    def _model(self) -> tuple[object, ...]:
        return self.ref.base, {*self.include}, {*self.exclude}, self.hub_id

    @property
    def repo(self) -> str:
        """What its model is called in the Hub view."""
        return self.ref.location if self.ref.scheme == "hf" else self.hub_id or _hub_name(self.name)

    @property
    def hub_folder(self) -> str:
        """Its folder in the Hub view: `models--org--model`."""
        return _folder_of(self.repo)

    @property
    def hub_revision(self) -> str | None:
        """The movable revision a Hub client would ask for, None when the ref names a commit."""
        return None if self.ref.is_pinned else self.ref.revision or "main"

    def __str__(self) -> str:
        """The ref, and what narrows it."""
        hub_id = (self.hub_id,) if self.hub_id else ()
        patterns = (("include", self.include), ("exclude", self.exclude), ("hub_id", hub_id))
        narrowed = ", ".join(f"{word} {' '.join(told)}" for word, told in patterns if told)
        return f"{self.ref} ({narrowed[:200]})" if narrowed else str(self.ref)

    def as_document(self) -> dict[str, object]:
        """The spec as JSON members, read back by `from_document`."""
        return {
            "ref": str(self.ref),
            "name": self.name,
            "include": list(self.include),
            "exclude": list(self.exclude),
            **({"hub_id": self.hub_id} if self.hub_id else {}),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read what `as_document` wrote. Raises Invalid, KeyError or TypeError on anything else."""
        ref, name = Ref.parse(str(document["ref"])), str(document["name"])
        hub_id = document.get("hub_id")
        return cls(
            ref,
            name,
            _patterns(document["include"]),
            _patterns(document["exclude"]),
            None if hub_id is None else str(hub_id),
        )


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise Invalid("include and exclude are lists of patterns", code="invalid")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One manifest whose blobs are all here, under a name, declared ready.

    `manifest` is the manifest's id, `size` its bytes, `files` their count, `published_at` seconds since
    the epoch, `commit` the 40 digits and `repo` the id that name it in the Hub view. `file` and
    `verified_by` are what the manifest says. `address` is the name below models/ that leads to this snapshot
    and to no other.
    """

    spec: ModelSpec
    manifest: str
    revision: str
    size: int
    files: int
    verified: bool
    published_at: float
    repo: str
    commit: str
    file: str | None = None
    address: str = ""
    verified_by: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Raises Invalid: each of these names a directory or a link of the cache."""
        for told in (self.manifest, self.revision, self.commit):
            if not _HEX.fullmatch(told):
                raise Invalid(f"{told!r:.80} names no snapshot of {self.name}", code="bad_manifest")
        check_path(self.repo)
        if self.file is not None:
            check_path(self.file)
        if not self.address:
            object.__setattr__(self, "address", self.addresses[0])
        elif self.address not in self.addresses:
            raise Invalid(f"{self.address!r:.80} is no address of {self.name}", code="bad_manifest")

    @property
    def addresses(self) -> list[str]:
        """What its address may be, the best first: `NAME@REVISION`; followed by digits of the manifest's id
        where patterns narrow it, or where another snapshot has that address."""
        bare = f"{self.name}@{self.revision}"
        longer = [f"{bare}-{self.manifest[:_ID_DIGITS]}", f"{bare}-{self.manifest}"]
        return longer if self.spec.include or self.spec.exclude else [bare, *longer]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def hub_folder(self) -> str:
        """Its folder in the Hub view: `models--org--model`."""
        return _folder_of(self.repo)

    @property
    def hub_revision(self) -> str | None:
        """The movable revision a Hub client would ask for, None when the spec names a commit."""
        return self.spec.hub_revision


def snapshot_of(spec: ModelSpec, manifest: Manifest, published_at: float) -> Snapshot:
    """What publishing `manifest` under the spec's name declares."""
    return Snapshot(
        spec=spec,
        manifest=manifest.id,
        revision=manifest.revision,
        size=manifest.size,
        files=len(manifest.files),
        verified=manifest.is_verified,
        verified_by=manifest.verified_by,
        published_at=published_at,
        repo=spec.repo,
        commit=commit_of(manifest),
        file=manifest.single_file,
    )


def _folder_of(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


def _hub_name(name: str) -> str:
    """What a model of another source than the Hub is called in the Hub view: a single word.

    A repository of the Hub is `org/model`, in the folder `models--org--model`. A name may hold `--`, too, and
    must not lead into that folder. It ends with digits of its hash then, to differ from every other name.
    """
    if "--" not in name:
        return name
    return f"{re.sub('-{2,}', '-', name)}-{hashlib.sha256(name.encode()).hexdigest()[:_ID_DIGITS]}"


def commit_of(manifest: Manifest) -> str:
    """The 40 digits that stand for the manifest's revision in the Hub view."""
    return manifest.revision[:40]
