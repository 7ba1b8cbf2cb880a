"""What README.md and SECURITY.md take from elsewhere: from code, figures of a run, the index of attacks."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cachd import config
from cachd.api.access import RULES
from cachd.api.app import ROUTERS
from cachd.metrics import table as metrics_table
from cachd.policy.roles import Role
from cachd.sources import entries
from tests import refs

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
SECURITY = PROJECT / "SECURITY.md"
ATTACKS = PROJECT / "tests/attacks/index.toml"
MEASUREMENTS = PROJECT / "bench" / "measurements.md"


ATTACKERS = {
    "origin": "An origin that cachd is told to pull from",
    "client": "A client of the API without a token",
    "tenant": "A client whose token lets it ask for pulls",
    "pod": "A pod with the read-only mount",
    "share": "A writer on an allowed share",
    "node": "Another user of the node, or of the volume that holds the root",
}


def renew() -> None:
    for page in (README, SECURITY):
        page.write_text(rendered(page.read_text()))


def rendered(text: str) -> str:
    """A page with every marked part as it should be now."""
    parts = {
        "refs": refs.table(),
        "roles": roles(),
        "options": options(),
        "sources": sources(),
        "metrics": metrics(),
        "measurements": measurements(),
        "attacks": attacks(),
    }
    for name, content in parts.items():
        if f"<!-- {name} -->" not in text:
            continue
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{begin}{content}\n{end}{after}"
    return text


def roles() -> str:
    """Each call, the roles that may make it, and what it concerns, in the order of the rules."""
    calls = {
        route.name: f"`{next(iter(route.methods))} {route.path}`"
        for router in ROUTERS
        for route in router.routes
    }
    calls["openapi"] = "`GET /docs`, `/openapi.json`"
    del calls["docs"]
    rows = [f"| {calls[name]} | {_allowed(name)} | {_concerns(name)} |" for name in RULES if name in calls]
    names = " | ".join(f"`{role.name}`" for role in Role)
    return "\n".join([f"| Call | no token | {names} | Concerns |", f"|---|{'---|' * (len(Role) + 2)}", *rows])


def _allowed(name: str) -> str:
    needed = RULES[name].role
    nobody = "yes" if needed is None else "open" if needed is Role.read else ""
    return " | ".join([nobody, *("yes" if needed is None or role >= needed else "" for role in Role)])


def _concerns(name: str) -> str:
    rule = RULES[name]
    fields: dict[str, list[str]] = {}
    for field, role in rule.fields.items():
        fields.setdefault(role.name, []).append(f"`{field}`")
    also = "".join(f"; {' and '.join(names)} need `{role}`" for role, names in fields.items())
    return rule.concerns.value + also


def options() -> str:
    rows = [
        f"| `{key}` | `{env}` | {_code(default)} | {text} |" for key, env, default, text in config.table()
    ]
    return "\n".join(["| Key | Environment | Default | Meaning |", "|---|---|---|---|", *rows])


def sources() -> str:
    rows = [f"| `{column}` | {schemes} | {text} |" for column, schemes, text in entries.columns()]
    return "\n".join(["| Column | Of | What it says |", "|---|---|---|", *rows])


def metrics() -> str:
    rows = [f"| `{name}` | {meaning} |" for name, meaning in sorted(metrics_table())]
    return "\n".join(["| Metric | Meaning |", "|---|---|", *rows])


def attacks() -> str:
    """The index of attacks: a table for each attacker."""
    index = tomllib.loads(ATTACKS.read_text()).values()
    tables = []
    for attacker in dict.fromkeys([*ATTACKERS, *(row["attacker"] for row in index)]):
        rows = [
            f"| {row['attack']} | {row['holds']} | {', '.join(_test(name) for name in row['tests'])} |"
            for row in index
            if row["attacker"] == attacker
        ]
        title = ATTACKERS.get(attacker, f"A {attacker}")
        tables.append(
            "\n".join([f"### {title}\n", "| Attack | What holds | Tests |", "|---|---|---|", *rows])
        )
    return "\n\n".join(tables)


def _test(name: str) -> str:
    return f"`{name.removeprefix('tests/')}`"


def measurements() -> str:
    """The goals, and the first question with its plot; the rest stays in its file."""
    sections = MEASUREMENTS.read_text().split("\n### ")[1:]
    goals, first = (f"### {section.strip()}" for section in sections[:2])
    return f"{goals}\n\n{first}\n\n![One file, cold: GB/s of each way](bench/cold.png)"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    renew()
