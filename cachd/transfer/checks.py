"""Checks a model before it is published: that it is complete, and that the operator refuses none of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

from cachd.errors import Invalid, Leased
from cachd.foreign import pieces_of
from cachd.model import File, Manifest, ModelSpec, matches
from cachd.model.finding import Finding
from cachd.model.snapshot import SAFE
from cachd.model.triton import CONFIGURATION, layout_of
from cachd.policy import numbered, placeholders, shards, weight_lengths
from cachd.policy.copies import copied
from cachd.preflight.codes import Mode
from cachd.preflight.contents import StoredContents
from cachd.preflight.examine import examine_checked
from cachd.sources.cancel import CancelToken
from cachd.sources.table import Table
from cachd.store.content import ContentStore

_MAX_NAMED = 5  # missing files that an error names
_MAX_FINDINGS = 40  # that are kept with a snapshot
_MAX_SOUGHT = 1000  # of one set, so many missing files are compared with the patterns


def selected(resolved: Manifest, spec: ModelSpec, table: Table) -> Manifest:
    """The files that a pull makes ready: those that the spec selects, without what the table leaves out.

    `copied` of the manifest says which of them the views show as copies, and `layout` how the plain view
    arranges them.

    Raises Invalid, and Forbidden for a file that the operator refuses.
    """
    manifest = table.only_safe(spec.select(resolved), asked=spec.formats == SAFE).without(resolved)
    table.check_files(manifest)
    paths = [f.path for f in manifest.files]
    layout = layout_of(paths, spec.layout)
    movable = [path for path in paths if layout is None or path != CONFIGURATION]
    return replace(manifest, copied=copied(movable, spec.copy), layout=layout)


def check_numbers(manifest: Manifest, source: Manifest, spec: ModelSpec) -> None:
    """Raises Invalid when a numbered set of weights has a gap that the spec's patterns do not leave out.

    `manifest` has the selected files, `source` all files of the source.
    """
    selected = {f.path for f in manifest.files}
    for gap in numbered.gaps((f.path for f in source.files), most=_MAX_SOUGHT):
        if selected.isdisjoint(gap.present):
            continue
        wanted = [path for path in gap.absent if _is_wanted(path, spec)]
        if wanted:
            missing = gap.missing - (len(gap.absent) - len(wanted))
            raise Invalid(
                f"{source.base} lacks {missing} of the {gap.of} files of a set: {_named(wanted, missing)};"
                f" it has {_named(gap.present, len(gap.present))}",
                code="incomplete_model",
                hint="report it to the owner of the source, pull the complete set, or exclude the files",
            )


def check_shards(
    manifest: Manifest, source: Manifest, spec: ModelSpec, content: ContentStore
) -> tuple[str, ...]:
    """Compare the indexes of a model with its files, and return a warning for each index that is stale.

    An index is stale if the source has none of the shards that it names, and other weights of that format
    beside it. Raises Invalid when an index names other shards that the source lacks, unless the spec's
    patterns leave them out. `manifest` has the selected files, `source` all files of the source.
    """
    selected, there = {f.path for f in manifest.files}, {f.path for f in source.files}
    warnings = []
    for index in (f for f in manifest.files if shards.is_index(f.path)):
        with content.opened(index) as opened:
            named = shards.named(index.path, pieces_of(opened, index.size), there)
        wanted = [path for path in named.absent if _is_wanted(path, spec)]
        if not wanted:
            continue
        others = shards.others(index.path, selected)
        more = "" if len(named.absent) < shards.MAX_SHOWN else " or more"
        missing = f"{index.path} names {len(wanted)}{more} shards that {source.base} lacks"
        if not named.present and others:
            warnings.append(
                f"{missing}; the index is stale: the weights beside it are {_named(others, len(others))}"
            )
            continue
        raise Invalid(
            f"{missing}: {_named(wanted, len(wanted))}",
            code="incomplete_model",
            hint="report it to the owner of the source, or exclude the index if no engine needs it",
        )
    return tuple(warnings)


def check_weights(manifest: Manifest, content: ContentStore) -> None:
    """Raises Invalid for a file whose content is not what its name says: a pointer, a page, cut-off weights.

    A matching digest does not rule this out: it may be the digest of the pointer or of an incomplete upload.
    A blob on which a pod holds a lease is not opened: it was published before, and checked then.
    """
    for file in manifest.files:
        if placeholders.is_binary(file.path) or placeholders.may_be_pointer(file.path, file.size):
            with suppress(Leased), content.reads.reading(), content.opened(file) as opened:
                _check_weights(file, f"{manifest.base} has {file.path!r:.200} with {file.size} bytes", opened)


def _check_weights(file: File, shown: str, opened: BinaryIO) -> None:
    found = placeholders.found(file.path, file.size, opened)
    missing = None
    if placeholders.is_binary(file.path):
        opened.seek(0)
        missing = weight_lengths.shortage(file.path, file.size, opened)
    if found:
        raise Invalid(f"{shown}: it is {found.what}", code="incomplete_model", hint=found.hint)
    if missing:
        raise Invalid(
            f"{shown}, but {missing}: a copy or an upload of it broke off, or has not ended",
            code="incomplete_model",
            hint="copy or upload the file again; a SHA256SUMS that is written last shows that it is complete",
        )


def check_preflight(manifest: Manifest, content: ContentStore, mode: Mode) -> tuple[Finding, ...]:
    """What an engine would find wrong with a model, to be kept with its snapshot.

    Raises Invalid when an engine would refuse the model and `mode` is strict.
    """
    if mode is Mode.off:
        return ()
    found = examine_checked(StoredContents(manifest, content))
    if mode is Mode.strict and found.refused:
        shown = "; ".join(f"{each.file or each.code}: {each.detail}" for each in found.refused[:_MAX_NAMED])
        more = f"; and {len(found.refused) - _MAX_NAMED} more" if len(found.refused) > _MAX_NAMED else ""
        raise Invalid(
            f"an engine would refuse {manifest.base}: {shown}{more}",
            code="preflight_refused",
            hint="report it to the owner of the model; with preflight: warn, it is pulled all the same",
        )
    return found.notable[:_MAX_FINDINGS]


def check_contents(
    manifest: Manifest, table: Table, content: ContentStore, cancel_token: CancelToken
) -> None:
    """Raises Forbidden when the operator refuses a file's sha256 and the source does not state that sha256.

    Such a file is read and hashed if its sha256 is unknown. This happens only while any digest is refused.
    """
    for file in manifest.files if table.refused else ():
        if not file.is_named_by_content:
            known = file.known_sha256 or content.hashes.of(file)
            table.check_digest(file, known or content.computed_sha256(file, cancel_token.check))


def _is_wanted(path: str, spec: ModelSpec) -> bool:
    """Whether the spec's patterns would select a file that is not there."""
    return (not spec.include or matches(path, spec.include)) and not matches(path, spec.exclude)


def _named(paths: Sequence[str], count: int) -> str:
    """The first paths, for an error."""
    shown = ", ".join(f"{path!r:.120}" for path in paths[:_MAX_NAMED])
    return shown + (f" and {count - _MAX_NAMED} more" if count > _MAX_NAMED else "")
