"""Combines the groups of options into one flat set of keys."""

from collections.abc import Iterator

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from cachd.config.api import ApiOptions
from cachd.config.cluster import ClusterOptions
from cachd.config.group import Reloaded
from cachd.config.hub import HubOptions
from cachd.config.logs import LogsOptions
from cachd.config.models import ModelsOptions
from cachd.config.network import NetworkOptions
from cachd.config.root import RootOptions
from cachd.config.sources import SourcesOptions
from cachd.config.space import SpaceOptions
from cachd.config.transfer import TransferOptions
from cachd.config.upkeep import UpkeepOptions
from cachd.fields import AbsolutePath
from cachd.settings.given import Also, variable_of


class Config(  # the documentation shows the groups from the last one to the first, as pydantic orders them
    LogsOptions,
    ClusterOptions,
    UpkeepOptions,
    SpaceOptions,
    TransferOptions,
    NetworkOptions,
    SourcesOptions,
    ModelsOptions,
    HubOptions,
    ApiOptions,
    RootOptions,
):
    """The daemon's options."""

    model_config = ConfigDict(defer_build=False)

    config: AbsolutePath | None = Field(None, description="YAML file that sets these options")


RELOADED_KEYS = frozenset(
    key
    for key, field in Config.model_fields.items()
    if any(isinstance(mark, Reloaded) for mark in field.metadata)
)


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, environment variable, default, help) of every option, for the documentation."""
    for key, field in Config.model_fields.items():
        yield key, variable_of(key), _default(field), _help(key, field)


def _default(field: FieldInfo) -> str:
    default = field.default
    if default in (None, (), {}):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _help(key: str, field: FieldInfo) -> str:
    others = [v for also in field.metadata if isinstance(also, Also) for v in also.variables]
    text = field.description or ""
    text += f"; if it is not set: {', else '.join(others)}" if others else ""
    return text + ("; reloaded when the file changes" if key in RELOADED_KEYS else "")
