"""Prints disk space: capacity, evictions, and what a pull would need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachd.model.units import count_text
from cachd.terminal.amounts import age_text, size_text
from cachd.terminal.models import digests_text, show_files
from cachd.terminal.output import say, show_facts, show_table, warn


def show_capacity(now: Mapping[str, Any]) -> None:
    """Print one figure a line, then NAME SIZE LAST-USED PROTECTED of each snapshot, the largest first."""
    figures = {k.removesuffix("_bytes"): size_text(v) for k, v in now.items() if k.endswith("_bytes") and v}
    figures["inodes"] = f"{now['free_inodes']} free, {now['reserve_inodes']} of them reserved"
    figures["in use"] = f"reported by {now['in_use_reported_by']}"
    show_facts(figures)
    say("")
    show_table(("NAME", "SIZE", "LAST-USED", "PROTECTED"), [_snapshot_row(s) for s in now["snapshots"]])


def show_evictions(document: Mapping[str, Any]) -> None:
    """Print NAME FREES WHY of each eviction, done or planned, in order; then the protected snapshots."""
    rows = [
        (_names(s), size_text(s.get("freed_bytes", s.get("frees_bytes", 0))), s["why"])
        for s in document["evictions"]
    ]
    protected = document.get("protected")
    if rows or "enough" not in document:
        show_table(("NAME", "FREES", "WHY"), rows, none="nothing was evicted")
    if protected:
        if rows:
            say("")
        show_table(("PROTECTED", "BY"), [(_names(s), s["protected_by"]) for s in protected])
    if document.get("dry_run"):
        enough = "enough" if document["enough"] else "not enough, so nothing would be evicted"
        short, frees = size_text(document["short_bytes"]), size_text(document["frees_bytes"])
        say(f"{short} short, {frees} would be freed: {enough}")


def _snapshot_row(snapshot: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells NAME SIZE LAST-USED PROTECTED for one snapshot's document."""
    return (
        _names(snapshot),
        size_text(snapshot["bytes"]),
        f"{age_text(snapshot['last_used'])} ago" if snapshot["last_used"] else "-",
        snapshot["protected_by"] or "-",
    )


def _names(snapshot: Mapping[str, Any]) -> str:
    return ",".join(snapshot["names"]) or str(snapshot["manifest"])


def show_resolved(document: Mapping[str, Any]) -> None:
    """Print the files of a ref, then what a pull would fetch and evict."""
    show_files(document["files"], document["file_count"])
    stated, by = digests_text(document["verified_by"])
    facts = {
        "ref": document["ref"],
        "revision": document["revision"],
        "name": document["name"],
        "size": f"{size_text(document['bytes'])} in {count_text(document['file_count'], 'file')}",
        "digests": f"for {stated} of {count_text(document['file_count'], 'file')}{f' ({by})' if by else ''}",
    }
    if document["left_out"]:
        gone = document["left_out"]
        facts["left out"] = f"{count_text(gone['files'], 'file')}, {size_text(gone['bytes'])}"
    facts["here"] = size_text(document["here_bytes"])
    facts["to fetch"] = size_text(document["fetch_bytes"])
    say("")
    show_facts(facts)
    if document["advice"]:
        warn(f"advice: {document['advice']}")
    if document["space"]:
        _show_space(document["space"], evicts=document["evicts"])


def _show_space(space: Mapping[str, Any], *, evicts: bool) -> None:
    """Print whether a pull has the space that it needs, and what would be evicted for it."""
    if not space["short_bytes"]:
        say("it fits: nothing would be evicted")
        return
    short = f"{size_text(space['short_bytes'])} are missing"
    if not evicts:
        warn(f"{short}, and evict: false forbids a pull to evict models: it would fail", style="red")
    elif not space["enough"]:
        warn(
            f"{short}, and only {size_text(space['frees_bytes'])} can be freed: a pull would fail",
            style="red",
        )
    else:
        say(f"{short}; a pull would evict:")
    show_evictions({**space, "dry_run": False})
