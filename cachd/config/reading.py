"""Reads the options from flags, the environment and the file.

flags, environment, file
  -> Given    the unparsed value of each option that is set, and what set it
  -> Config   every option, parsed and checked
  -> Loaded   both, so that each value can say where it was set
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from cachd.config.faults import MAX_FINDINGS, conflicts, faults, refusal
from cachd.config.options import Config
from cachd.errors import CachdError
from cachd.fields import absolute
from cachd.findings import Finding
from cachd.settings import file as configfile
from cachd.settings.file import ConfigFile
from cachd.settings.given import Given, given, ours, variable_of


@dataclass(frozen=True, slots=True)
class LastGood:
    """Why an earlier configuration is used, and the time (since the epoch) at which it was kept."""

    fault: CachdError
    kept_at: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """The options in force, and what set each of them.

    `flags` are the flags of the command line. `again` reads them once more. `last_good`: set while an earlier
    configuration is used, because the file is wrong.
    """

    config: Config
    given: Given
    flags: Mapping[str, object]
    last_good: LastGood | None = None

    @property
    def content(self) -> bytes:
        """The bytes of the configuration file as it was read; empty without a file."""
        return self.given.file.content if self.given.file else b""

    def place(self, *loc: str | int) -> str:
        """Where a value was set, as `FILE:LINE`, a variable or a flag; empty for a default.

        `loc` is the option's key, followed by keys and indexes inside its value.
        """
        return str(self.given.place(loc))

    def again(self) -> Loaded:
        """Read flags, environment and file again. Raises Invalid."""
        return read(**self.flags)

    def updated(self, now: Loaded, keys: Collection[str]) -> Loaded:
        """A copy of these options in which `keys` have their values of `now`."""
        config = self.config.model_copy(update={key: getattr(now.config, key) for key in keys})
        kept = {key: setting for key, setting in self.given.settings.items() if key not in keys}
        taken = {key: setting for key, setting in now.given.settings.items() if key in keys}
        return Loaded(config, Given(kept | taken, now.given.file), self.flags)

    def differs_from(self, other: Loaded) -> list[str]:
        """The keys whose values differ between the two."""
        return [k for k in Config.model_fields if getattr(self.config, k) != getattr(other.config, k)]


def load(**flags: object) -> Config:
    """The options in force. A flag that is None counts as not given. Raises Invalid as `read` does."""
    return read(**flags).config


def read(**flags: object) -> Loaded:
    """The options in force, and where each was set. Raises Invalid with one line for each wrong option."""
    path = path_of_file(flags)
    return _parsed(flags, configfile.read(path) if path else None)


def read_kept(kept: ConfigFile, last_good: LastGood, **flags: object) -> Loaded:
    """As `read`, but with the keys of an earlier configuration in place of those of the file."""
    return replace(_parsed(flags, kept), last_good=last_good)


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found wrong with options, and the options that are right.

    `findings`: one for each wrong option, sorted. `more`: how many faults have no finding, because there are
    too many. In `loaded`, each option that is wrong has its default.
    """

    findings: list[Finding]
    more: int
    loaded: Loaded


def examine(**flags: object) -> Examined:
    """What is wrong with the options. It raises nothing, and gives the options that are right."""
    path = path_of_file(flags)
    return _examined(flags, configfile.examine(path) if path else None)


def path_of_file(flags: Mapping[str, object]) -> Path | None:
    """The configuration file that a flag or a variable names."""
    named = flags.get("config") or ours().get(variable_of("config"))
    return absolute(Path(str(named))) if named else None


def _parsed(flags: Mapping[str, object], file: ConfigFile | None) -> Loaded:
    found = _examined(flags, file)
    # Raised here, because pydantic's error shows values, which may be secrets.
    if found.findings:
        raise refusal(found.findings, found.more)
    return found.loaded


def _examined(flags: Mapping[str, object], file: ConfigFile | None) -> Examined:
    flags = {name: value for name, value in flags.items() if value is not None}
    found = given({name: field.metadata for name, field in Config.model_fields.items()}, flags, file)
    findings, more, config = list(file.findings) if file else [], 0, None
    values = found.values()
    while config is None:
        try:
            config = Config.model_validate(values)
        except ValidationError as error:
            findings += faults(error, found)
            more += max(error.error_count() - MAX_FINDINGS, 0)
            wrong = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
            right = {name: value for name, value in values.items() if name not in wrong}
            # A default may be wrong beside a value that is set: then no value is used.
            values = right if len(right) < len(values) else {}
    findings += conflicts(config, found)
    return Examined(sorted(findings), more, Loaded(config, found, flags))
