"""Keeps the configuration that was last used, and starts the daemon with it when its file is wrong.

    .cachd/last_good.json    {"keys": …, "outside": …}, mode 0600

`keys` is what the file set, unparsed; `outside` is what flags and variables set of the options that protect.
No option holds a secret: options name the files that do.

A start with a wrong file uses the kept keys with the flags and variables of today, and nothing of the file.
It is refused as before if that could protect less than the configuration that was kept:

    an option that protects is set from outside, and not as it was then (or no longer)
    the root is not safe, or the kept keys are of another root
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from cachd import files
from cachd.config import Config, LastGood, Loaded, path_of_file, read, read_kept
from cachd.config.api import ApiOptions
from cachd.config.network import NetworkOptions
from cachd.config.sources import SourcesOptions
from cachd.daemon.listen import check_listen
from cachd.daemon.logs import configure_logs
from cachd.daemon.store import unleased
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.kernel import durable
from cachd.settings.file import LONGEST_BYTES, ConfigFile, examine
from cachd.settings.given import Given, Giver, ours, variable_of
from cachd.store.layout import Layout
from cachd.store.root import check_above, check_root, own_directory, own_place

log = structlog.get_logger(__name__)

_LONGEST_KEPT_BYTES = 2 * LONGEST_BYTES  # JSON may be longer than the file that it is made of
# Who may connect, what may be pulled, and by which way.
PROTECTIVE = frozenset(
    key for group in (ApiOptions, SourcesOptions, NetworkOptions) for key in group.model_fields
)


def read_or_last_good(**flags: object) -> Loaded:
    """The options in force, or the last good ones if the file is wrong. Raises Invalid or Forbidden."""
    try:
        loaded = read(**flags)
        check_listen(loaded.config)
    except (Invalid, Forbidden) as fault:
        configure_logs("warning", "auto")
        roots = list(_roots(flags))
        for root in roots:
            if found := _last_good(root, fault, flags):
                return found
        if len(roots) == 1 and not _outside_root(flags):
            _hint_root(fault)
        raise
    return loaded


def keep(loaded: Loaded, layout: Layout) -> None:
    """Keep a configuration that the daemon uses. Logs a failure."""
    given = loaded.given
    keys = {key: each.value for key, each in given.settings.items() if each.giver is Giver.file}
    content = json.dumps({"keys": keys, "outside": _outside(given)}, indent=1).encode()
    try:
        if _kept(layout.last_good) != content:
            with durable.disk_errors(layout.last_good):
                durable.write_file(layout.last_good, content, mode=0o600)
    except CachdError as error:
        log.warning("last good configuration not kept", reason=error.detail)


def _last_good(root: Path, fault: CachdError, flags: Mapping[str, object]) -> Loaded | None:
    """The configuration that is kept in a root; None if there is none, or it may not be used."""
    for place in (root, own_place(root)):
        if os.path.lexists(Layout(place).last_good):
            try:
                return _used(root, place, fault, flags)
            except CachdError as error:
                log.warning("last good configuration not used", root=str(root), reason=error.detail)
    return None


def _used(root: Path, place: Path, fault: CachdError, flags: Mapping[str, object]) -> Loaded:
    """The configuration kept in `place`, which is the root or its own directory. Raises CachdError."""
    if place == root:
        check_above(root)
        check_root(root)
    else:
        own_directory(root)
    kept = Layout(place).last_good
    document = unleased(place, lambda: _parsed(kept))
    with durable.disk_errors(kept):
        kept_at = kept.stat().st_mtime
    wrong = ConfigFile(str(kept), _wrong_content(flags), document["keys"])
    loaded = read_kept(wrong, LastGood(fault.with_traceback(None), kept_at), **flags)
    check_listen(loaded.config)
    if (loaded.config.root.absolute(), loaded.config.own_directory) != (root.absolute(), place != root):
        raise Invalid(f"{kept} is the configuration of the root {loaded.config.root}", code="bad_config")
    now = _outside(loaded.given)
    if different := sorted(key for key in PROTECTIVE if now.get(key) != document["outside"].get(key)):
        raise Invalid(
            f"flags and variables do not set {', '.join(different)} as they did when {kept} was kept",
            code="bad_config",
        )
    return loaded


def _outside(given: Given) -> dict[str, str]:
    """What flags and variables set of the options that protect."""
    settings = given.settings.items()
    return {k: str(each.value) for k, each in settings if k in PROTECTIVE and each.giver is not Giver.file}


def _parsed(kept: Path) -> dict[str, dict[str, Any]]:
    """The document of a kept configuration. Raises CachdError."""
    try:
        document = json.loads(_kept(kept))
        return {"keys": dict(document["keys"]), "outside": dict(document["outside"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Invalid(f"{kept} is not a configuration that cachd kept", code="bad_config") from None


def _kept(path: Path) -> bytes:
    """The content of a kept configuration; empty if there is none. Raises CachdError."""
    with durable.disk_errors(path), suppress(FileNotFoundError):
        return durable.read_file(path, at_most=_LONGEST_KEPT_BYTES)
    return b""


def _roots(flags: Mapping[str, object]) -> Iterator[Path]:
    """Where the root may be: as flags and variables say, else as the wrong file says, or the default."""
    if outside := _outside_root(flags):
        yield Path(outside)
        return
    if path := path_of_file(flags):
        root = examine(path).keys.get("root")  # of a file that is not YAML, too
        if isinstance(root, str):
            yield Path(root)
    yield Config.model_fields["root"].default


def _outside_root(flags: Mapping[str, object]) -> str:
    """The root that a flag or a variable names; empty if none does."""
    return str(flags.get("root") or ours().get(variable_of("root")) or "")


def _hint_root(fault: CachdError) -> None:
    """Say how a start finds the configuration that it used last, when nothing names the root."""
    if fault.code != "bad_config":
        return
    hint = "to start with the last good configuration, name the root of the cache: --root or CACHD_ROOT"
    fault.hint = f"{fault.hint}; {hint}" if fault.hint else hint


def _wrong_content(flags: Mapping[str, object]) -> bytes:
    """The content of the wrong file, so that the daemon notices when it changes; empty if unreadable."""
    path = path_of_file(flags)
    with suppress(OSError):
        return files.content(path, at_most=LONGEST_BYTES) if path else b""
    return b""
