"""Formats the answers of the command line for people: tables, rows and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.filesize import decimal

from cachd.errors import CachdError, printable

# Consoles, tables and bars are imported where they are used: a command that prints one path needs none.


def show_error(error: CachdError) -> None:
    """Print the error's detail, hint, withheld facts and code on standard error."""
    warn(f"error: {error.detail}", style="red")
    if error.hint:
        warn(f"  hint: {error.hint}")
    # An error from the daemon has none. Those of this process may be shown: its user is the operator.
    for name, fact in error.withheld.items():
        warn(f"  {name}: {fact}")
    warn(f"  code: {error.code}")


def warn(line: str, style: str | None = None) -> None:
    """Print lines on standard error. On a terminal they have the style."""
    text = _escaped(line)
    if not sys.stderr.isatty():
        print(text, file=sys.stderr)
        return
    from rich.console import Console

    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: object) -> None:
    """Print lines that may hold text of strangers. Control characters in them are escaped."""
    print(_escaped(str(text)))


def _escaped(text: str) -> str:
    """The lines of a text, with their control characters escaped."""
    return "\n".join(map(printable, text.split("\n")))


def show_json(document: object) -> None:
    """Print the document as JSON. What JSON lacks, such as a path, is printed as text."""
    print(json.dumps(document, indent=1, default=str))


def show_table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table as kubectl does: no borders, upper-case headings, one row for each thing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=None, header_style="", pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # do not wrap lines in a pipe
    console.print(table)


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
        show_table(("PREFIX", "COLUMN", "FROM"), _entries(document["sources"]))
        return
    say(f"{document['ref']} is {document['verdict']}")
    if document["error"]:
        say(document["error"]["detail"])
    rows = [
        (each["column"], _plain(each["value"]), each["prefix"] or "", each["where"])
        for each in document["columns"]
    ]
    show_table(("COLUMN", "VALUE", "PREFIX", "FROM"), rows)


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


def model_row(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of MODEL_HEADINGS for one model's document."""
    ready, pull = model["ready"], model["pull"]
    total = ready["bytes"] if ready else pull["bytes"]["total"] if pull else 0
    done = total if ready else pull["bytes"]["done"] if pull else 0
    age = _age(ready["published_at"]) if ready else "-"
    return (
        model["name"],
        model["state"],
        decimal(total) if total else "-",
        f"{100 * done // total}%" if total else "-",
        _yes(model["verified"]),
        _yes(model["pinned"]),
        _yes(model["in_use"]),
        str(len(ready["warnings"]) or "-") if ready else "-",
        model["ref"],
        age,
    )


MODEL_HEADINGS = ("NAME", "STATE", "SIZE", "DONE", "VERIFIED", "PINNED", "IN-USE", "WARNINGS", "REF", "AGE")


def limit_rows(limits: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """SOURCE LIMIT rows: all sources together first, then each source with a limit of its own."""
    every = limits["bytes_per_second"]
    rates = {"all": f"{decimal(every)}/s" if every else "none"}
    rates |= {source: f"{decimal(rate)}/s" for source, rate in limits["sources"].items()}
    return list(rates.items())


def show_capacity(now: Mapping[str, Any]) -> None:
    """Print one figure a line, then NAME SIZE LAST-USED PROTECTED of each snapshot, the largest first."""
    figures = {k.removesuffix("_bytes"): decimal(v) for k, v in now.items() if k.endswith("_bytes") and v}
    figures["inodes"] = f"{now['free_inodes']} free, {now['reserve_inodes']} of them reserved"
    figures["in use"] = f"reported by {now['in_use_reported_by']}"
    width = max(map(len, figures))
    for key, value in figures.items():
        say(f"{key:<{width}}  {value}")
    show_table(("NAME", "SIZE", "LAST-USED", "PROTECTED"), [_snapshot_row(s) for s in now["snapshots"]])


def show_evictions(document: Mapping[str, Any]) -> None:
    """Print NAME FREES WHY of each eviction, done or planned, in order; then the protected snapshots."""
    rows = [
        (*_snapshot_row(s)[:1], decimal(s.get("freed_bytes", s.get("frees_bytes", 0))), s["why"])
        for s in document["evictions"]
    ]
    show_table(("NAME", "FREES", "WHY"), rows)
    if document.get("protected"):
        show_table(("PROTECTED", "BY"), [_snapshot_row(s)[::3] for s in document["protected"]])
    if document.get("dry_run"):
        enough = "enough" if document["enough"] else "not enough, so nothing would be evicted"
        short, frees = decimal(document["short_bytes"]), decimal(document["frees_bytes"])
        say(f"{short} short, {frees} would be freed: {enough}")


def _snapshot_row(snapshot: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells NAME SIZE LAST-USED PROTECTED for one snapshot's document."""
    return (
        ",".join(snapshot["names"]) or snapshot["manifest"],
        decimal(snapshot.get("bytes", 0)),
        f"{_age(snapshot['last_used'])} ago" if snapshot.get("last_used") else "-",
        snapshot.get("protected_by") or "-",
    )


def show_model(model: Mapping[str, Any]) -> None:
    """Print one fact about a model on each line."""
    ready, pull = model["ready"], model["pull"]
    facts: dict[str, object] = {k: model[k] for k in ("name", "state", "ref", "path")}
    if model["file"]:
        facts["file"] = model["file"]
    facts["verified"] = _yes(model["verified"])
    if model["verified_by"]:
        facts["verified_by"] = ", ".join(f"{by} ({files})" for by, files in model["verified_by"].items())
    facts |= {k: _yes(model[k]) for k in ("pinned", "in_use")}
    if ready:
        facts["immutable_path"] = model["immutable_path"]
        facts |= {k: ready[k] for k in ("revision", "manifest", "files", "published_at")}
        facts |= {"size": decimal(ready["bytes"]), "hub": f"{ready['hub']['repo']}@{ready['hub']['commit']}"}
    for before in model["previous"][:1]:
        facts["previous"] = f"{before['ref']} {before['revision']}"
    if ready:
        facts["resident"] = decimal(model["resident_bytes"])
        facts |= {"left out": left_out} if (left_out := _left_out(ready)) else {}
        facts |= {"warning" if n < 2 else f"warning {n}": w for n, w in enumerate(ready["warnings"], 1)}
        facts |= {"advice": ready["advice"]} if ready["advice"] else {}
    facts |= {f"damage {k}": v for k, v in (model["damage"] or {}).items()}
    if model["verified_at"]:
        facts["verified_at"] = model["verified_at"]
    if pull:
        count = pull["bytes"]
        facts["pull"] = (
            f"{pull['state']}: {decimal(count['done'])} of {decimal(count['total'])},"
            f" {decimal(count['fetched'])} fetched, {decimal(count['resumed'])} resumed,"
            f" {decimal(pull['rate_bytes_per_second'])}/s"
        )
        if pull["error"]:
            facts |= {f"error {k}": v for k, v in pull["error"].items()}
    width = max(map(len, facts))
    for key, value in facts.items():
        say(f"{key:<{width}}  {value}")


def warn_of(ready: Mapping[str, Any]) -> None:
    """Print on standard error what a user of a model that is ready may want to know."""
    for warning in ready["warnings"]:
        warn(f"warning: {warning}", style="yellow")
    if left_out := _left_out(ready):
        warn(f"left out: {left_out}")
    if ready["advice"]:
        warn(f"advice: {ready['advice']}")


def _left_out(ready: Mapping[str, Any]) -> str:
    """What patterns and weights left out, for people; empty if nothing."""
    if not (gone := ready["left_out"]):
        return ""
    forms = f" ({', '.join(gone['weights'])})" if gone["weights"] else ""
    return f"{gone['files']} files, {decimal(gone['bytes'])}{forms}"


def show_verification(name: str, verification: Mapping[str, Any]) -> None:
    """Print one line for each damaged file, then the result."""
    for each in verification["damaged"]:
        say(f"{each['path'] or name}: {each['wrong']}")
    if verification["error"]:
        say(verification["error"]["detail"])
    say(f"{name} {verification['state']} {decimal(verification['bytes']['done'])}")


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on a terminal, and nothing in a pipe.

    Yields a function that takes the state, the bytes done and the total bytes.
    """
    from rich import progress
    from rich.console import Console

    stderr = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(printable(name), total=None)

        def update(state: str, done: int, total: int) -> None:
            bar.update(task, description=printable(f"{name} {state}"), completed=done, total=total or None)

        yield update


def _yes(value: object) -> str:
    return "-" if value is None else "yes" if value else "no"


def _age(published_at: str, now: Callable[[], float] = time.time) -> str:
    seconds = int(now() - datetime.fromisoformat(published_at).timestamp())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{max(seconds, 0)}s"
