"""Finds the error codes in the source of cachd that end a pull for good."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cachd import errors
from cachd.errors import CachdError
from cachd.report.outcomes import outcome_of

PROJECT = Path(__file__).parent.parent.parent
PULLS = ("sources", "transfer", "store", "model", "policy")
ENDS_A_PULL = [*(m for part in PULLS for m in sorted((PROJECT / "cachd" / part).rglob("*.py")))]
ENDS_A_PULL += [PROJECT / "cachd/foreign.py"]
# Codes of these modules that end no pull: they are about a request, an option, a root or a ready model.
ENDS_NO_PULL = {
    *("bad_hub_id", "bad_limit", "bad_name", "bad_option", "bad_revision", "invalid", "unknown_scheme"),
    *("url_query", "url_secrets", "outside_namespaces", "role_too_low"),
    *("bad_format", "bad_root", "unsafe_root", "disk_too_small", "no_hard_links"),
    *("no_previous", "no_such_lease", "no_such_model", "no_such_snapshot", "not_found"),
    *("manifest_unreadable", "no_pull", "previous_incomplete"),
}


def final_codes() -> dict[int, set[str]]:
    """Every final code of the modules that work for a pull, by HTTP status."""
    found: dict[int, set[str]] = {500: {"internal"}}
    for kind, code in (pair for module in ENDS_A_PULL for pair in raised_by(module)):
        outcome = outcome_of(kind(""))
        if outcome.is_final:
            found.setdefault(outcome.status, set()).add(code)
    return found


def raised_by(module: Path) -> Iterator[tuple[type[CachdError], str]]:
    """Each class of error that a module raises, with its codes."""
    tree = ast.parse(module.read_text())
    texts = {
        target.id: constants(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        kind = getattr(errors, getattr(call.func, "id", ""), None)
        if not (isinstance(kind, type) and issubclass(kind, CachdError)):
            continue
        given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        codes = [kind.code or "internal"] if not given else constants(given[0])
        if given and isinstance(given[0], ast.Name):
            codes = texts[given[0].id]
        yield from ((kind, code) for code in codes)


def constants(value: ast.expr) -> list[str]:
    """The texts that an expression may give: `a if b else c` gives two."""
    if isinstance(value, ast.IfExp):
        return constants(value.body) + constants(value.orelse)
    return [value.value] if isinstance(value, ast.Constant) and isinstance(value.value, str) else []
