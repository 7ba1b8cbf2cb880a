"""Says what a preflight found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cachd.model.units import count_text
from cachd.terminal.amounts import size_text
from cachd.terminal.output import say, say_beside, show_facts

_STATE_WIDTH = len("warning")


def show_preflight(document: Mapping[str, Any]) -> None:
    """Print the facts about a model, a line for each finding with its hint, and how many there are."""
    show_facts(_facts(document))
    say("")
    findings = document["findings"]
    width = max((len(each["code"]) for each in findings), default=0)
    for each in findings:
        of_file = f"{each['file']}: " if each.get("file") else ""
        label = f"{each['level']:<{_STATE_WIDTH}}  {each['code']:<{width}}  "
        say_beside(label, f"{of_file}{each['detail']}")
        if each["level"] != "ok" and each.get("hint"):
            say_beside(" " * len(label), f"hint: {each['hint']}")
    counted = Counter(each["level"] for each in findings)
    warnings = count_text(counted["warning"], "warning")
    say(f"{document['name']}: {counted['refused']} refused, {warnings}, {counted['ok']} ok")


def finding_text(finding: Mapping[str, Any]) -> str:
    """One finding on one line."""
    of_file = f"{finding['file']}: " if finding.get("file") else ""
    return f"{finding['level']}: {of_file}{finding['detail']} ({finding['code']})"


def _facts(document: Mapping[str, Any]) -> dict[str, object]:
    size, by_type = document["weights_bytes"], document["tensor_bytes"]
    facts: dict[str, object] = {
        "name": document["name"],
        "ref": document["ref"],
        "loaders": ", ".join(document["loaders"]) or "none that is known",
        "architectures": ", ".join(document["architectures"]),
        "dtype": document["dtype"],
        "weights": f"{size_text(size)}, which a GPU needs at least" if size else None,
        "tensors": document["tensors"] or None,
        "types": ", ".join(f"{name} ({size_text(number)})" for name, number in by_type.items()),
        "base model": document["base_model"],
    }
    return {name: fact for name, fact in facts.items() if fact not in (None, "")}
