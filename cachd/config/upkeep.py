"""Options of the upkeep of what is published."""

from pydantic import Field

from cachd.config.group import Group
from cachd.fields import Rate, Seconds


class UpkeepOptions(Group):
    """How often published bytes are verified, and how long leftovers are kept."""

    keep_previous: int = Field(
        1, ge=0, le=100, description="how many earlier snapshots of each name to keep for cachd rollback"
    )
    scrub_bytes_per_second: Rate = Field(
        20_000_000,
        description="most bytes a second to re-read when verifying published models in the background, at"
        " idle I/O priority; 0: do not scrub",
    )
    scrub_interval_seconds: Seconds = Field(
        604800.0, gt=0, description="re-read and verify every published blob once in this time"
    )
    sweep_interval_seconds: Seconds = Field(
        3600.0,
        ge=0,
        description="remove leftovers that no model and no pull needs once in this time; 0: only on request",
    )
    keep_unfinished_seconds: Seconds = Field(
        86400.0,
        ge=0,
        description="keep partial downloads of ended pulls for this long, so that the next pull resumes them",
    )
