"""Prints what is in force: options, entries of `sources`, and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cachd.terminal.amounts import rate_text
from cachd.terminal.output import say, show_table, warn


def show_options(document: Mapping[str, Any]) -> None:
    """Print KEY VALUE FROM of the options in force, and why the configuration file is not in force."""
    rows = []
    for option in document["options"]:
        if option["key"] == "sources" and option["value"]:
            rows += [
                ("sources", f"{prefix} {rest}", where) for prefix, rest, where in _entries(option["value"])
            ]
        else:
            rows.append((option["key"], _plain(option["value"]), option["where"] or option["source"]))
    show_table(("KEY", "VALUE", "FROM"), rows)
    for reason in not_in_force(document.get("file") or {}):
        warn(reason, style="red")


def show_sources(document: Mapping[str, Any]) -> None:
    """Print the settings that apply to a ref, or every entry of `sources`."""
    if "sources" in document:
        none = "the option sources has no entry; cachd sources REF shows what holds for a ref"
        show_table(("PREFIX", "COLUMN", "FROM"), _entries(document["sources"]), none=none)
        return
    is_allowed = document["verdict"] == "allowed"
    why = "no entry of sources refuses it, and a public address over https needs no entry of allow"
    say(f"{document['ref']} is {document['verdict']}{f': {why}' if is_allowed else ''}")
    if document["error"]:
        say(document["error"]["detail"])
    columns = [each for each in document["columns"] if _concerns(each, document["ref"])]
    rows = [(each["column"], _plain(each["value"]), each["prefix"] or "", each["where"]) for each in columns]
    show_table(("COLUMN", "VALUE", "PREFIX", "FROM"), rows)


def _concerns(column: Mapping[str, Any], ref: str) -> bool:
    """Whether a column applies to a ref: prefixes of the option `allow` that do not cover it say nothing."""
    if column["column"] != "allow" or column["prefix"] or not isinstance(column["value"], list):
        return True
    from urllib.parse import urlsplit

    from cachd.policy.address_policy import AddressPolicy  # it takes longer to load than most commands to run

    return AddressPolicy(map(str, column["value"])).covers(urlsplit(ref))


def _entries(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (entry["prefix"], f"{column}={_plain(value)}", entry["where"][column])
        for entry in entries
        for column, value in entry["columns"].items()
    ]


def not_in_force(file: Mapping[str, Any]) -> list[str]:
    """The reasons why the daemon does not use the configuration file as it is; none when it does."""
    reasons = []
    if file.get("error"):
        reasons.append(f"the configuration file on disk is not in force: {file['error']['detail']}")
    if file.get("waiting_for_restart"):
        waiting = ", ".join(file["waiting_for_restart"])
        reasons.append(f"these options take effect when the daemon restarts: {waiting}")
    return reasons


def _plain(value: object) -> str:
    """A JSON value as people write it in a file."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return str(value["ref"]) if "ref" in value else ", ".join(f"{k}={v}" for k, v in value.items())
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def limit_rows(limits: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """SOURCE LIMIT rows: all sources together first, then each source with a limit of its own."""
    every = limits["bytes_per_second"]
    rates = {"all": rate_text(every) if every else "none"}
    rates |= {source: rate_text(rate) for source, rate in limits["sources"].items()}
    return list(rates.items())
