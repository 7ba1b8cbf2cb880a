"""The grammar of s3:// refs: a bucket, and a prefix or a key in it."""

from __future__ import annotations

import re

from cachd.errors import Invalid
from cachd.model.grammar import Located, Steps, not_a_prefix
from cachd.model.name import is_clean, shown

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class BucketGrammar:
    """`bucket/prefix/` or `bucket/key`. See `Grammar`."""

    has_host = False
    root = ""
    is_address = False

    def parse(self, text: str, rest: str) -> Located:
        """See `Grammar.parse`."""
        bucket, slash, prefix = rest.partition("/")
        parts = prefix.rstrip("/").split("/")
        if not _BUCKET.fullmatch(bucket) or not slash or not prefix.strip("/") or not is_clean(parts):
            raise Invalid(
                f"{shown(text)} does not name objects of a bucket",
                code="bad_ref",
                hint="write s3://bucket/prefix/ (or s3://bucket/key for one object), without '..' or '//'",
            )
        return Located(rest)

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """See `Grammar.prefix`."""
        parts = rest.removesuffix("/").split("/")
        if not _BUCKET.fullmatch(parts[0]) or any(p in ("", ".", "..") for p in parts):
            raise not_a_prefix(typed, "write s3://bucket/ or s3://bucket/x/, without '..' or '//'")
        return tuple(parts), f"s3://{'/'.join(parts)}/"

    def steps(self, url: str, _is_strict: object) -> Steps:
        """See `Grammar.steps`."""
        return tuple(part for part in url.partition("://")[2].split("/") if part)
