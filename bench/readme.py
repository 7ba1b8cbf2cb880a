"""The parts of README.md that come from elsewhere: tables from code, figures from a run."""

from __future__ import annotations

from pathlib import Path

from cachd import config
from cachd.api.access import RULES
from cachd.api.app import ROUTERS
from cachd.metrics import MEASURED, Metrics
from cachd.policy.roles import Role
from tests import refs

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
MEASUREMENTS = PROJECT / "bench" / "measurements.md"


def renew() -> None:
    README.write_text(rendered(README.read_text()))


def rendered(text: str) -> str:
    """README.md with every marked part as it should be now."""
    parts = {
        "refs": refs.table(),
        "roles": roles(),
        "options": options(),
        "metrics": metrics(),
        "measurements": measurements(),
    }
    for name, content in parts.items():
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
    calls["openapi"] = "`GET /docs`, `/redoc`, `/openapi.json`"
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


def metrics() -> str:
    told = Metrics()
    told.watch(gauges=lambda: dict.fromkeys(MEASURED, 0.0), models=dict, limits=dict, resident=dict)
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family.documentation
        for family in told.registry.collect()
    }
    rows = [f"| `{name}` | {meaning} |" for name, meaning in sorted(families.items())]
    return "\n".join(["| Metric | Meaning |", "|---|---|", *rows])


def measurements() -> str:
    """The goals, and the first question with its plot; the rest stays in its file."""
    sections = MEASUREMENTS.read_text().split("\n### ")[1:]
    goals, first = (f"### {section.strip()}" for section in sections[:2])
    return f"{goals}\n\n{first}\n\n![One file, cold: GB/s of each way](bench/cold.png)"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    renew()
