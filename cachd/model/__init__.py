"""The values that all packages share, with the functions that parse, check and print them.

The values are frozen, and check themselves when they are made.
"""

from cachd.model.digest import STRENGTHS, Digest, Extent
from cachd.model.grammar import Steps, not_a_prefix
from cachd.model.hub import HUB_HOSTS
from cachd.model.limits import Limits, Percentage, SizeOrPercent, amount_in
from cachd.model.manifest import MAX_FILES, UNVERIFIED, Entries, File, Manifest, matches
from cachd.model.name import NAME_PATTERN, check_name, check_path, has_invisible, quoted
from cachd.model.ref import Ref
from cachd.model.scheme import SCHEMES, Scheme, SchemeName
from cachd.model.snapshot import ModelSpec, Snapshot, commit_of, snapshot_of
from cachd.model.typed import Typed
from cachd.model.units import bytes_of, percentage_of, rate_of, seconds_of, shown, size_or_percent_of

__all__ = [
    "HUB_HOSTS",
    "MAX_FILES",
    "NAME_PATTERN",
    "SCHEMES",
    "STRENGTHS",
    "UNVERIFIED",
    "Digest",
    "Entries",
    "Extent",
    "File",
    "Limits",
    "Manifest",
    "ModelSpec",
    "Percentage",
    "Ref",
    "Scheme",
    "SchemeName",
    "SizeOrPercent",
    "Snapshot",
    "Steps",
    "Typed",
    "amount_in",
    "bytes_of",
    "check_name",
    "check_path",
    "commit_of",
    "has_invisible",
    "matches",
    "not_a_prefix",
    "percentage_of",
    "quoted",
    "rate_of",
    "seconds_of",
    "shown",
    "size_or_percent_of",
    "snapshot_of",
]
