"""Lists the options in force, each with where it was set. No value contains a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cachd.config import Config, Loaded, Model
from cachd.errors import Forbidden
from cachd.model import SCHEMES, Limits, Percentage, Ref
from cachd.settings.given import Giver
from cachd.sources.entries import COLUMNS, schemes_of
from cachd.sources.secrets import HubToken
from cachd.sources.table import Held, Table


@dataclass(frozen=True, slots=True)
class Effective:
    """One option: its value as JSON, what set it, and where (`--root`, `CACHD_ROOT`, `FILE:LINE`)."""

    key: str
    value: object
    source: Giver
    where: str

    def as_document(self) -> dict[str, object]:
        """The option as `GET /v1/options` shows it."""
        return {"key": self.key, "value": self.value, "source": self.source.value, "where": self.where}


def effective(loaded: Loaded, limits: Limits | None = None) -> list[Effective]:
    """Every option, in the order of the documentation. `limits`: the bandwidth limits in force, which the API
    may have changed."""
    found = [_effective(loaded, key) for key in Config.model_fields]
    if limits is None or limits == loaded.config.limits:
        return found
    by_api = {"limit_bytes_per_second": limits.bytes_per_second or 0, "source_limits": dict(limits.sources)}
    return [
        Effective(each.key, by_api[each.key], Giver.api, "PUT /v1/limits") if each.key in by_api else each
        for each in found
    ]


def entries(loaded: Loaded) -> list[dict[str, object]]:
    """The entries of `sources`: each with its prefix, the columns it sets, and where each column was set."""
    return [
        {
            "prefix": str(entry.prefix),
            "columns": {name: _plain(value) for name, value in entry.set_columns()},
            "where": {name: loaded.place("sources", n, name) for name, _ in entry.set_columns()},
        }
        for n, entry in enumerate(loaded.config.sources)
    ]


# The option that applies when no entry sets a column; for a column that only some schemes have, see `Scheme`.
_DEFAULTS = {
    "allow": "allow",
    "refuse": "refuse",
    "limit": "source_limits",
}


def holding(loaded: Loaded, table: Table, ref: Ref) -> dict[str, object]:
    """The settings for a ref: whether it may be pulled, each column with the entry that sets it, and the
    patterns of refused and allowed files."""
    refusal = None
    try:
        table.check(ref.base)
        held, (refused, allowed) = table.held(ref.base), table.patterns(ref.base)
    except Forbidden as error:
        refusal = error
        held, refused, allowed = {}, (), ()
    columns = [name for name in COLUMNS if ref.scheme in schemes_of(name)]
    return {
        "ref": str(ref),
        "verdict": "refused" if refusal else "allowed",
        "error": refusal.as_document() if refusal else None,
        "columns": [_column(loaded, name, ref.scheme, held) for name in columns],
        "files": {"refuse": list(refused), "allow": list(allowed)},
        "refused_digests": sorted(map(str, table.refused)),
    }


def _column(loaded: Loaded, name: str, scheme: str, held: Mapping[str, Held]) -> dict[str, object]:
    if own := held.get(name):
        where = loaded.place("sources", own.number, name)
        return {"column": name, "value": _plain(own.value), "prefix": str(own.by), "where": where}
    option = _DEFAULTS.get(name) or SCHEMES[scheme].columns.get(name)
    if option is None or (name == "credentials" and "endpoint" in held):
        return {"column": name, "value": None, "prefix": None, "where": ""}
    found = _effective(loaded, option)
    value = loaded.config.limits.sources.get(scheme) if name == "limit" else found.value
    return {"column": name, "value": value, "prefix": None, "where": found.where or found.source.value}


def _effective(loaded: Loaded, key: str) -> Effective:
    setting = loaded.given.settings.get(key)
    if setting is not None and key == "sources":
        return Effective(key, entries(loaded), setting.giver, str(setting.place))
    if setting is not None:
        return Effective(key, _plain(getattr(loaded.config, key)), setting.giver, str(setting.place))
    if key == "hf_token_file":
        return _token()
    return Effective(key, _plain(getattr(loaded.config, key)), Giver.default, "")


def _token() -> Effective:
    """The option hf_token_file when it is not set: where the Hub's own tools find a token."""
    place = HubToken(None).place()
    by_login = not place.variable and place.file is not None and os.path.isfile(place.file)  # noqa: PTH113 never raises
    where = place.variable or ("hf auth login" if by_login else "")
    giver = Giver.ecosystem if where else Giver.default
    return Effective("hf_token_file", "set" if where else None, giver, where)


def _plain(value: object) -> object:
    """The value as JSON, without passwords."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Model):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Path | Percentage):
        return str(value)
    return _without_password(value) if isinstance(value, str) else value


def _without_password(text: str) -> str:
    """A URL without its query, and without the user and password before its host."""
    scheme, mark, rest = text.rpartition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + re.sub(r"\?.*", "?…", path)
