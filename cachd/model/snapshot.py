"""Defines the model spec, which is what a user asks for, and the snapshot that fulfils it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Self

from cachd.errors import Invalid
from cachd.model.default_name import default_name
from cachd.model.finding import Finding
from cachd.model.hub import check_hub_id, folder_of
from cachd.model.manifest import Manifest
from cachd.model.name import check_name, check_path, check_patterns
from cachd.model.ref import Ref
from cachd.model.selection import LeftOut
from cachd.model.triton import VERSION, check_layout
from cachd.model.typed import Typed
from cachd.model.weights import ALL, Weights, chosen

_ID_DIGITS = 8  # hex digits of a manifest's id in an address
SAFE = "safe"
SAFETY = ("all", SAFE)  # values of `formats`
_HEX = re.compile(r"[0-9a-f]{32,64}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a user asks for: a ref, a local name, and what selects files. Equal specs share one pull.

    `weights`: the form of the weights, such as `gguf:Q4_K_M`; it selects among the files that the patterns
    select. `hub_id`: the Hub repository `org/model` under which a mirror elsewhere appears in the Hub view.
    `copy`: patterns of the files that the views show as copies (policy/copies.py); None: chosen by name.
    `formats`: `safe` leaves pickles out, or refuses the model; None: as the source's entry says. `layout`:
    where the plain view has the files (triton.py); None: where the source has them.
    """

    ref: Ref
    name: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hub_id: str | None = None
    weights: str = ALL
    copy: tuple[str, ...] | None = None
    formats: str | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        """Raises Invalid for a field that could not be stored, listed or shown."""
        check_name(self.name)
        check_patterns(self.include, "include")
        check_patterns(self.exclude, "exclude")
        check_patterns(self.copy or (), "copy")
        object.__setattr__(self, "weights", str(Weights.parse(self.weights)))
        if self.formats not in (None, *SAFETY):
            raise Invalid(
                f"formats is {self.formats[:80]!a}", code="bad_formats", hint=f"use {' or '.join(SAFETY)}"
            )
        check_layout(self.layout)
        if self.hub_id is None:
            return
        if self.ref.scheme == "hf":
            raise Invalid(
                f"{self.ref} is a model of the Hub, but hub_id is {self.hub_id[:120]!a}",
                code="bad_hub_id",
                hint="leave hub_id out: a model of the Hub has a folder of its own in the Hub view",
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
        weights: str | None = None,
        copy: Sequence[str] | None = None,
        formats: str | None = None,
        layout: str | None = None,
    ) -> Self:
        """The spec of a user's request; without a `name` it has the default name. Raises Invalid."""
        typed = Typed.parse(ref)
        form = str(Weights.parse(weights or typed.weights or ALL))
        if typed.weights and form != typed.weights:
            raise Invalid(
                f"the ref asks for the weights {typed.weights}, and weights for {form}",
                code="bad_ref",
                hint="choose the weights either by the ref or by weights",
            )
        if typed.path and include:
            raise Invalid(
                f"the ref selects {typed.path:.120}, and include selects files, too",
                code="bad_ref",
                hint="select files either by the ref or by include",
            )
        include = [escape(typed.path)] if typed.path else include
        if name is None:
            name = default_name(typed.ref, include, exclude, form)
        copied = None if copy is None else tuple(copy)
        return cls(typed.ref, name, tuple(include), tuple(exclude), hub_id, form, copied, formats, layout)

    def is_of_same_model(self, other: ModelSpec) -> bool:
        """Whether pods see the same files of one model, at any revision."""
        return self._model == other._model

    @property
    def _model(self) -> tuple[object, ...]:
        selected = self.ref.base, {*self.include}, {*self.exclude}, self.weights.lower(), self.formats == SAFE
        return *selected, self.hub_id, self.layout

    @property
    def is_selective(self) -> bool:
        """Whether it may leave out files of its source."""
        return bool(self.include or self.exclude) or self.weights != ALL or self.formats == SAFE

    def select(self, manifest: Manifest) -> Manifest:
        """The manifest of the files that this spec selects; `left_out` counts the others. Raises Invalid."""
        matching = manifest.select(self.include, self.exclude)
        kept = chosen([f.path for f in matching.files], self.weights)
        selected = matching.only(f for f in matching.files if f.path in kept)
        return selected.without(manifest)

    @property
    def repo(self) -> str:
        """The id of its model in the Hub view."""
        return self.ref.location if self.ref.scheme == "hf" else self.hub_id or _hub_name(self.name)

    @property
    def hub_folder(self) -> str:
        """Its folder in the Hub view: `models--org--model`."""
        return folder_of(self.repo)

    @property
    def hub_revision(self) -> str | None:
        """The branch or tag that a Hub client would ask for; None when the ref names a commit."""
        return None if self.ref.is_pinned else self.ref.revision or "main"

    def __str__(self) -> str:
        """The ref, with the patterns, the weights and the hub_id in parentheses."""
        hub_id = (self.hub_id,) if self.hub_id else ()
        weights = (self.weights,) if self.weights != ALL else ()
        formats = (self.formats,) if self.formats else ()
        layout = (self.layout,) if self.layout else ()
        patterns = (
            ("include", self.include),
            ("exclude", self.exclude),
            ("weights", weights),
            ("formats", formats),
            ("layout", layout),
            ("copy", self.copy or ()),
            ("hub_id", hub_id),
        )
        details = ", ".join(f"{word} {' '.join(values)}" for word, values in patterns if values)
        return f"{self.ref} ({details[:200]})" if details else str(self.ref)

    def as_document(self) -> dict[str, object]:
        """The spec as JSON, for `from_document`."""
        return {
            "ref": str(self.ref),
            "name": self.name,
            "include": list(self.include),
            "exclude": list(self.exclude),
            **({"hub_id": self.hub_id} if self.hub_id else {}),
            **({"weights": self.weights} if self.weights != ALL else {}),
            **({"copy": list(self.copy)} if self.copy is not None else {}),
            **({"formats": self.formats} if self.formats else {}),
            **({"layout": self.layout} if self.layout else {}),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read the result of `as_document`. Raises Invalid, KeyError or TypeError for anything else."""
        ref, name = Ref.parse(str(document["ref"])), str(document["name"])
        hub_id, copy, formats = (document.get(key) for key in ("hub_id", "copy", "formats"))
        return cls(
            ref,
            name,
            _patterns(document["include"]),
            _patterns(document["exclude"]),
            None if hub_id is None else str(hub_id),
            str(document.get("weights", ALL)),
            None if copy is None else _patterns(copy),
            None if formats is None else str(formats),
            check_layout(document.get("layout")),
        )


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise Invalid("include, exclude and copy must be lists of patterns", code="invalid")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A manifest whose blobs are all on the disk, published as ready under a name.

    `manifest` is the manifest's id, `size` the bytes of its files and `files` their number. `published_at` is
    a Unix time. `repo` and the 40 digits of `commit` name the snapshot in the Hub view. `file` is where
    the plain view has the manifest's `single_file`, or its `single_gguf` if GGUF was asked for.
    `verified_by`, `left_out`, `warnings`, `findings`, `advice` and `renamed_to` are the manifest's own.
    `is_main`: the spec names a commit, and `main` of the Hub view named that commit when it was published.
    `address` is a link below models/ that leads to this snapshot and never to another.
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
    left_out: LeftOut | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)
    findings: tuple[Finding, ...] = field(default=(), compare=False)
    advice: str | None = field(default=None, compare=False)
    renamed_to: str | None = field(default=None, compare=False)
    is_main: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Raises Invalid for a field that could not be the name of a directory or a link of the cache."""
        for part in (self.manifest, self.revision, self.commit):
            if not _HEX.fullmatch(part):
                raise Invalid(f"{part!r:.80} names no snapshot of {self.name}", code="bad_manifest")
        check_path(self.repo)
        if self.renamed_to is not None:
            check_hub_id(self.renamed_to)
        if self.file is not None:
            check_path(self.file.removeprefix(f"{VERSION}/"))  # a layout may make a longest path longer
        if not self.address:
            object.__setattr__(self, "address", self.addresses[0])
        elif self.address not in self.addresses:
            raise Invalid(f"{self.address!r:.80} is not an address of {self.name}", code="bad_manifest")

    @property
    def addresses(self) -> list[str]:
        """The possible addresses of the snapshot, the best first.

        The best is `NAME@REVISION`. Digits of the manifest's id follow if patterns or weights select its
        files, if it has a layout, or if another snapshot has that address.
        """
        bare = f"{self.name}@{self.revision}"
        longer = [f"{bare}-{self.manifest[:_ID_DIGITS]}", f"{bare}-{self.manifest}"]
        return longer if self.spec.is_selective or self.spec.layout else [bare, *longer]

    @property
    def name(self) -> str:
        """The local name under which pods find it."""
        return self.spec.name

    @property
    def hub_folder(self) -> str:
        """Its folder in the Hub view: `models--org--model`."""
        return folder_of(self.repo)

    @property
    def hub_alias(self) -> str | None:
        """The folder of the new name of a renamed repository; None if it was not renamed."""
        if self.renamed_to is None or self.spec.ref.scheme != "hf":
            return None
        return folder_of(self.renamed_to)

    @property
    def hub_revision(self) -> str | None:
        """The branch or tag that a Hub client would ask for; None when the spec names a commit."""
        return self.spec.hub_revision

    @property
    def hub_refs(self) -> list[str]:
        """The branches and tags of the Hub view that named its commit when it was published."""
        return [self.hub_revision] if self.hub_revision else ["main"] if self.is_main else []


def snapshot_of(spec: ModelSpec, manifest: Manifest, published_at: float) -> Snapshot:
    """The snapshot of `manifest` under the spec's name."""
    file = manifest.single_gguf if spec.weights.startswith("gguf") else manifest.single_file
    return Snapshot(
        spec=spec,
        manifest=manifest.id,
        revision=manifest.revision,
        size=manifest.size,
        files=len(manifest.files),
        verified=manifest.has_all_digests,
        verified_by=manifest.verified_by,
        left_out=manifest.left_out,
        warnings=manifest.warnings,
        findings=manifest.findings,
        advice=manifest.advice,
        renamed_to=manifest.renamed_to,
        published_at=published_at,
        repo=spec.repo,
        commit=commit_of(manifest),
        file=manifest.place_of(file) if file else None,
    )


def _hub_name(name: str) -> str:
    """The id in the Hub view of a model that is not from the Hub: one word without `--`.

    A Hub repository `org/model` has the folder `models--org--model`, which a name with `--` must not reach.
    In such a name `--` becomes `-`, and digits of the name's hash follow, so that it differs from all others.
    """
    if "--" not in name:
        return name
    return f"{re.sub('-{2,}', '-', name)}-{hashlib.sha256(name.encode()).hexdigest()[:_ID_DIGITS]}"


def commit_of(manifest: Manifest) -> str:
    """The commit of the manifest in the Hub view: the first 40 digits of its revision."""
    return manifest.revision[:40]
