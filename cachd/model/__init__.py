"""The values that all packages share, with the functions that parse, check and print them.

The values are frozen, and check themselves when they are made.
"""

from cachd.model.digest import STRENGTHS, Digest, Extent
from cachd.model.grammar import Steps, not_a_prefix
from cachd.model.hub import COMMIT, HUB_FOLDER, HUB_HOSTS, SHORTENED, folder_of, is_hub_id, kind_and_repo
from cachd.model.limits import Limits, Percentage, SizeOrPercent, amount_in
from cachd.model.manifest import MAX_FILES, UNVERIFIED, Entries, File, Manifest
from cachd.model.name import NAME_PATTERN, check_name, check_path, has_invisible, is_name, quoted
from cachd.model.ref import Ref
from cachd.model.scheme import SCHEMES, Scheme, SchemeName
from cachd.model.selection import LeftOut, Unusable, matches
from cachd.model.snapshot import ModelSpec, Snapshot, commit_of, snapshot_of
from cachd.model.typed import Typed
from cachd.model.units import (
    bytes_of,
    count_text,
    percentage_of,
    rate_of,
    seconds_of,
    shown,
    size_or_percent_of,
)
from cachd.model.weights import ALL, FORMATS

__all__ = [
    "ALL",
    "COMMIT",
    "FORMATS",
    "HUB_FOLDER",
    "HUB_HOSTS",
    "MAX_FILES",
    "NAME_PATTERN",
    "SCHEMES",
    "SHORTENED",
    "STRENGTHS",
    "UNVERIFIED",
    "Digest",
    "Entries",
    "Extent",
    "File",
    "LeftOut",
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
    "Unusable",
    "amount_in",
    "bytes_of",
    "check_name",
    "check_path",
    "commit_of",
    "count_text",
    "folder_of",
    "has_invisible",
    "is_hub_id",
    "is_name",
    "kind_and_repo",
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
