"""Defines what all groups of options share.

The modules of options do not import annotations from __future__: pydantic would evaluate each annotation
twice, for the group and for Config.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Group(BaseModel):
    """A group of options on one subject. Config combines all groups."""

    # Config builds its validator from all fields, so the groups need none of their own.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Reloaded:
    """Marks an option that takes effect as soon as the file changes. All others need a restart."""


RELOADED = Reloaded()
