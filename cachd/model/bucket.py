"""The grammar of s3:// refs: a bucket or an access point, and a prefix or a key in it."""

from __future__ import annotations

import re

from cachd.errors import Invalid
from cachd.model.grammar import Located, Steps, not_a_prefix
from cachd.model.name import is_clean, shown

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# An access point, also of several regions or of an outpost, as AWS clients take it in place of a bucket
# (S3 User Guide, "Using Amazon S3 access points"). ":" and "/" mean the same after `accesspoint`, `outpost`.
_ARN = re.compile(
    r"(?P<head>arn:aws[a-z-]{0,20}:s3(-outposts|-object-lambda)?:[a-z0-9-]{0,32}:[0-9]{12})"
    r":(outpost[:/](?P<outpost>[A-Za-z0-9-]{1,63})[:/])?accesspoint[:/](?P<name>[A-Za-z0-9][A-Za-z0-9.-]{0,62})"
)
_COMPASS = {
    "n": "north",
    "e": "east",
    "s": "south",
    "w": "west",
    "c": "central",
    "ne": "northeast",
    "nw": "northwest",
    "se": "southeast",
    "sw": "southwest",
}
_ZONE = re.compile(r"--([a-z]{2})([nesw]|[ns][ew]|c)([0-9])-az[0-9]+--x-s3$")
_FORMS = "write s3://bucket/prefix/, s3://bucket/key for one object, or s3://bucket/ for the complete bucket"


class BucketGrammar:
    """`bucket/`, `bucket/prefix/` or `bucket/key`. The ARN of an access point may stand for the bucket.

    See `Grammar`.
    """

    kinds = ()
    has_host = False
    root = ""
    is_address = False

    def parse(self, text: str, rest: str) -> Located:
        """See `Grammar.parse`."""
        bucket, slash, key = _split(rest)
        parts = key.removesuffix("/").split("/") if key else []
        if not bucket or not slash or not is_clean(parts):
            raise Invalid(
                f"{shown(text)} does not name objects of a bucket",
                code="bad_ref",
                hint=f"{_FORMS}, without '..' or '//'",
            )
        return Located(f"{bucket}/{key}")

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """See `Grammar.prefix`."""
        bucket, _, key = _split(rest)
        parts = key.removesuffix("/").split("/") if key else []
        if not bucket or any(p in ("", ".", "..") for p in parts):
            raise not_a_prefix(typed, "write s3://bucket/ or s3://bucket/x/, without '..' or '//'")
        steps = (*bucket.split("/"), *parts)
        return steps, f"s3://{'/'.join(steps)}/"

    def steps(self, url: str, _is_strict: object) -> Steps:
        """See `Grammar.steps`."""
        return tuple(part for part in url.partition("://")[2].split("/") if part)


def bucket_and_key(location: str) -> tuple[str, str]:
    """Split a location, or `bucket/key`, into the bucket (or the ARN in its place) and the key or prefix."""
    bucket, _, key = _split(location)
    return bucket, key


def is_arn(bucket: str) -> bool:
    """Whether the ARN of an access point stands for the bucket."""
    return bucket.startswith("arn:")


def is_global(arn: str) -> bool:
    """Whether the ARN names a multi-region access point, whose requests are signed by SigV4A."""
    return arn.startswith("arn:") and arn.split(":")[3] == ""


def is_directory_bucket(bucket: str) -> bool:
    """Whether it is a bucket of S3 Express One Zone (S3 User Guide, "Directory bucket naming rules")."""
    return bucket.endswith("--x-s3")


def region_of_directory_bucket(bucket: str) -> str | None:
    """The region that the bucket's name states: us-west-2 for `models--usw2-az1--x-s3`."""
    zone = _ZONE.search(bucket)
    return f"{zone[1]}-{_COMPASS[zone[2]]}-{zone[3]}" if zone else None


def _split(rest: str) -> tuple[str, str, str]:
    """The bucket, the '/' after it and the key. The bucket is empty if it is not valid.

    An ARN is returned in the form that separates its parts with '/'.
    """
    found = _ARN.match(rest)
    if found:
        outpost = f"outpost/{found['outpost']}/" if found["outpost"] else ""
        after = rest[found.end() :]
        arn = f"{found['head']}:{outpost}accesspoint/{found['name']}"
        return (arn, after[:1], after[1:]) if after[:1] in ("", "/") else ("", "", "")
    bucket, slash, key = rest.partition("/")
    return bucket if _BUCKET.fullmatch(bucket) else "", slash, key
