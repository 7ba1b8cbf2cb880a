"""Checks a model whose blobs are all on the disk, before it is published."""

from __future__ import annotations

from contextlib import closing

from cachd.errors import Invalid
from cachd.model import Manifest
from cachd.policy import shards
from cachd.sources.cancel import CancelToken
from cachd.sources.table import Table
from cachd.store.content import ContentStore


def check_shards(manifest: Manifest, resolved: Manifest, content: ContentStore) -> None:
    """Raises Invalid when an index names shards that the source lacks. The spec may exclude shards.

    `manifest` has the selected files, `resolved` all files of the source.
    """
    paths = {f.path for f in resolved.files}
    indexes = [f for f in manifest.files if f.path.endswith(shards.INDEX)]
    for index in indexes:
        with closing(content.pieces(index)) as pieces:
            absent = shards.missing(index.path, pieces, paths)
        if absent:
            more = "" if len(absent) < shards.MAX_SHOWN else " or more"
            raise Invalid(
                f"{index.path} names {len(absent)}{more} shards that {resolved.base} lacks:"
                f" {absent[0]!r:.120}",
                code="incomplete_model",
                hint="report it to the owner of the source, or exclude the index if no engine needs it",
            )


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
