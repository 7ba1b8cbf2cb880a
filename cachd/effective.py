"""Each option's value in force, and where it came from. No secret is ever among them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cachd.config import Config, Loaded, Model
from cachd.model import Limits, Share
from cachd.settings.given import Giver
from cachd.sources.secrets import HubToken


@dataclass(frozen=True, slots=True)
class Effective:
    """One option: its value as JSON can hold it, who gave it, and where that stands."""

    key: str
    value: object
    source: Giver
    where: str

    def as_document(self) -> dict[str, object]:
        return {"key": self.key, "value": self.value, "source": self.source.value, "where": self.where}


def effective(loaded: Loaded, limits: Limits | None = None) -> list[Effective]:
    """Every option, in the order of the documentation. `limits` are those that the API may have set since."""
    found = [_effective(loaded, key) for key in Config.model_fields]
    if limits is None or limits == loaded.config.limits:
        return found
    told = {"limit_bytes_per_second": limits.bytes_per_second or 0, "source_limits": dict(limits.sources)}
    return [
        Effective(each.key, told[each.key], Giver.api, "PUT /v1/limits") if each.key in told else each
        for each in found
    ]


def _effective(loaded: Loaded, key: str) -> Effective:
    setting = loaded.settings.get(key)
    if setting is not None:
        return Effective(key, _plain(getattr(loaded.config, key)), setting.giver, str(setting.place))
    if key == "hf_token_file":
        return _token()
    return Effective(key, _plain(getattr(loaded.config, key)), Giver.default, "")


def _token() -> Effective:
    """Where the Hub token comes from when no option says it."""
    place = HubToken(None).place()
    by_login = not place.variable and place.file is not None and os.path.isfile(place.file)  # noqa: PTH113 never raises
    where = place.variable or ("hf auth login" if by_login else "")
    giver = Giver.ecosystem if where else Giver.default
    return Effective("hf_token_file", "set" if where else None, giver, where)


def _plain(value: object) -> object:
    """The value as JSON can hold it."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Model):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Path | Share):
        return str(value)
    return _without_password(value) if isinstance(value, str) else value


def _without_password(text: str) -> str:
    """An address without the user and password that may stand before its host, and without its query."""
    scheme, mark, rest = text.rpartition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + re.sub(r"\?.*", "?…", path)
