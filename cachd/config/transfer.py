"""Options of pulls."""

from typing import Annotated

from pydantic import Field

from cachd.config.group import RELOADED, Group
from cachd.fields import Rate, Seconds
from cachd.model import Limits
from cachd.preflight.codes import Mode
from cachd.settings.types import Rates


class TransferOptions(Group):
    """How many pulls run, how fast they are, and when they fail."""

    streams: int = Field(
        32,
        ge=1,
        le=256,
        description="most connections that receive at once, for all pulls together; adaptive: cachd adds"
        " connections only while throughput grows",
    )
    pulls: int = Field(4, ge=1, le=256, description="most models to pull at once; further pulls wait")
    queued_pulls: int = Field(
        10_000,
        ge=0,
        le=1_000_000,
        description="most pulls that may wait; a request beyond that is answered 503",
    )
    limit_bytes_per_second: Annotated[Rate, RELOADED] = Field(
        0,
        description="most bytes a second to receive from all sources together, such as 500MB; 0: no limit",
    )
    source_limits: Annotated[Rates, RELOADED] = Field(
        {},
        description="most bytes a second to receive from single sources, such as hf: 200MB",
    )
    retries: int = Field(
        8,
        ge=0,
        le=100,
        description="how often to request a part of a file again while it makes no progress; after that the"
        " pull fails",
    )
    resolve_seconds: Seconds = Field(
        1800.0,
        gt=0,
        le=86400,
        description="fail a pull whose source takes longer than this to list the model's files, or answers"
        " fewer than 30 requests in a minute",
    )

    preflight: Mode = Field(
        Mode.warn,
        description="examine models before they are published: warn keeps the findings and shows them; strict"
        " also fails the pull of a model that an engine would refuse; off examines none; see Preflight",
    )

    @property
    def limits(self) -> Limits:
        """The bandwidth limits, for all sources together and for single ones."""
        return Limits.of(self.limit_bytes_per_second, self.source_limits.items())
