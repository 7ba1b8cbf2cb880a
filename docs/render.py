"""Renders the parts of the pages that come from code or from measurements: `make docs`.

A part is between `<!-- NAME -->` and `<!-- /NAME -->` in a page. Tests compare each page with its rendering.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from pydantic import BaseModel

from bench import cold, results
from cachd import cli, config
from cachd.api.access import RULES
from cachd.api.app import ROUTERS
from cachd.doctor import codes
from cachd.metrics import table as metrics_table
from cachd.pod.recipe import EngineName, Recipe
from cachd.policy.roles import Role
from cachd.preflight import codes as preflight_codes
from cachd.sources import entries
from docs import chart
from tests import refs
from tests.conformance import kept
from tests.ground.codes import ENDS_NO_PULL, final_codes

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
SECURITY = PROJECT / "SECURITY.md"
DOCS = PROJECT / "docs"
BENCH = PROJECT / "bench/README.md"
PLOT = PROJECT / "bench/cold.svg"
ATTACKS = PROJECT / "tests/attacks/index.toml"
ORIGINS = DOCS / "origins.md"
WILD = PROJECT / "tests/wild"
CHART = PROJECT / "daemonset/chart/README.md"
PAGES = (README, SECURITY, BENCH, CHART, *sorted(DOCS.glob("*.md")))

SHARED = ("server", "token_file", "output")
ATTACKERS = {
    "origin": "An origin that cachd is told to pull from",
    "client": "A client of the API without a token",
    "hub-client": "A client of the Hub endpoint, such as any pod of the node",
    "tenant": "A client whose token lets it ask for pulls",
    "pod": "A pod with the read-only mount",
    "share": "A writer on an allowed share",
    "node": "Another user of the node, or of the volume that holds the root",
}
WILD_KINDS = {
    "http": "Web servers",
    "hub": "Hubs and repositories",
    "s3": "S3 servers and buckets",
    "share": "Shared volumes",
}


def renew() -> None:
    """Write every page, the plot and the schema of the chart as they should be now."""
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    PLOT.write_text(plot())
    chart.SCHEMA.write_text(chart.schema())


def rendered(text: str) -> str:
    """A page with every marked part as it should be now."""
    for name, content in PARTS.items():
        if f"<!-- {name} -->" not in text:
            continue
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{begin}{content()}\n{end}{after}"
    return text


def calls() -> str:
    """Each call of the API with its parameters, and what its docstring says."""
    rows = []
    for route in (route for router in ROUTERS for route in router.routes if route.include_in_schema):
        asked = "&".join(f"{query.alias}=" for query in route.dependant.query_params)
        call = f"`{next(iter(route.methods))} {route.path}{'?' if asked else ''}{asked}`"
        rows.append(f"| {call} | {' '.join(inspect.getdoc(route.endpoint).split())} |")
    return "\n".join(["| Call | Does |", "|---|---|", *rows])


def bodies() -> str:
    """The fields of each body that a call takes."""
    parts = []
    for route in (route for router in ROUTERS for route in router.routes):
        hints = get_type_hints(route.endpoint).values()
        for kind in (each for hint in hints for each in (get_args(hint) or [hint])):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                fields = kind.model_json_schema()["properties"].items()
                rows = [f"| `{name}` | {_type(of)} | {of.get('description', '')} |" for name, of in fields]
                call = f"### {next(iter(route.methods))} {route.path}\n"
                parts.append("\n".join([call, "| Field | Type | Meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _type(field: dict[str, Any]) -> str:
    kinds = [each.get("type", "") for each in field.get("anyOf", [field])]
    return " or ".join(kind for kind in kinds if kind)


def commands() -> str:
    """Each command of the command line with its help, its arguments and its options."""
    app = typer.main.get_group(cli.app)
    shared: dict[str, str] = {}
    parts = []
    for name, command in sorted(app.commands.items()):
        arguments = [_argument(each) for each in command.params if not each.opts[0].startswith("-")]
        lines = [f"### {' '.join(['cachd', name, *arguments])}", " ".join(command.help.split()), ""]
        for each in command.params:
            said = (each.help or "").replace("\\[", "[")  # escaped for rich
            text = f"- `{_word(each)}`: {' '.join(said.split())}"
            if each.name in SHARED:
                shared[each.name] = text
            else:
                lines.append(text)
        parts.append("\n".join(lines).rstrip())
    everywhere = "\n".join(shared[name] for name in SHARED)
    return "\n\n".join([f"### Options of all commands that ask the daemon\n\n{everywhere}", *parts])


def _argument(parameter: Any) -> str:
    """`NAME...` for an argument of several names, in brackets if it may be left out."""
    word = (
        parameter.name.removesuffix("s").upper() + "..." if parameter.nargs == -1 else parameter.name.upper()
    )
    return str(word if parameter.required else f"[{word}]")


def _word(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return _argument(parameter).strip("[]")
    value = "" if parameter.is_flag else f" {parameter.opts[0].strip('-').replace('-', '_').upper()}"
    return ", ".join(parameter.opts) + value


def exit_codes() -> str:
    """What each exit code means."""
    rows = [f"| {code} | {meaning} |" for code, meaning in cli.EXIT_CODES.items()]
    return "\n".join(["| Exit code | Meaning |", "|---|---|", *rows])


def final() -> str:
    """The codes of errors that end a pull for good, by HTTP status."""
    rows = [
        f"| {status} | {', '.join(f'`{code}`' for code in sorted(codes - ENDS_NO_PULL))} |"
        for status, codes in sorted(final_codes().items())
        if codes - ENDS_NO_PULL
    ]
    return "\n".join(["| Final | Codes |", "|---|---|", *rows])


def roles() -> str:
    """Each call, the roles that may make it, and what it concerns, in the order of the rules."""
    calls = {
        route.name: f"`{next(iter(route.methods))} {route.path}`"
        for router in ROUTERS
        for route in router.routes
    }
    calls["page"] = "`GET /`, `/docs`, `/assets/…`"
    del calls["docs"], calls["asset"]
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
    """Every option: key, variable, default, meaning."""
    rows = [
        f"| `{key}` | `{env}` | {_code(default)} | {text} |" for key, env, default, text in config.table()
    ]
    return "\n".join(["| Key | Environment | Default | Meaning |", "|---|---|---|---|", *rows])


def sources() -> str:
    """The columns of the option `sources`."""
    rows = [f"| `{column}` | {schemes} | {text} |" for column, schemes, text in entries.columns()]
    return "\n".join(["| Column | Of | What it says |", "|---|---|---|", *rows])


def metrics() -> str:
    """Every metric with its help."""
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


def origins() -> str:
    """The origins with odd behaviour: a table for each kind."""
    tables = []
    for kind, title in WILD_KINDS.items():
        rows = [
            f"| {row['server']} | {row['oddity']} | {row['answer']} | `{row['outcome']}` |"
            for row in tomllib.loads((WILD / f"{kind}.toml").read_text()).values()
        ]
        head = "| Server | Oddity | What cachd does | Outcome |"
        tables.append("\n".join([f"## {title}\n", head, "|---|---|---|---|", *rows]))
    return "\n\n".join(tables)


def checks() -> str:
    """The checks of the doctor: what each examines, and when its finding is a warning or wrong."""
    rows = [f"| `{code}` | {of} | {warning} | {wrong} |" for code, of, warning, wrong in codes.table()]
    return "\n".join(["| Code | Checks | Warning | Wrong |", "|---|---|---|---|", *rows])


def preflight() -> str:
    """The checks of a preflight: what each examines, and when its finding is a warning or refused."""
    rows = [
        f"| `{code}` | {of} | {warning} | {refused} |"
        for code, of, warning, refused in preflight_codes.table()
    ]
    return "\n".join(["| Code | Checks | Warning | Refused |", "|---|---|---|---|", *rows])


def _test(name: str) -> str:
    return f"`{name.removeprefix('tests/')}`"


def measurements() -> str:
    """The few figures that a user cares about."""
    return results.summary(results.kept())


def every_result() -> str:
    """The goals and every table."""
    return results.markdown(results.kept())


def plot() -> str:
    """One file to disk, by each way."""
    return cold.plot(results.kept()["cold"])


def recipes() -> str:
    """How `cachd env` starts each engine."""
    lines = ["| `--for` | Variables | Command |", "|---|---|---|"]
    for engine in EngineName:
        recipe = Recipe(engine, "NAME", "FILE.gguf" if engine is EngineName.llama_cpp else "")
        variables = " ".join(_code(f"{key}={value}") for key, value in recipe.env.items())
        command = " ".join([*recipe.command, *recipe.args])
        lines.append(f"| {engine} | {variables} | {_code(command) or f'loads `{recipe.path}`'} |")
    return "\n".join(lines)


def conformance() -> str:
    """Which clients loaded a model, by view and network."""
    return kept.table()


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


PARTS: dict[str, Callable[[], str]] = {
    "refs": refs.table,
    "roles": roles,
    "calls": calls,
    "bodies": bodies,
    "commands": commands,
    "exit-codes": exit_codes,
    "final": final,
    "doctor": checks,
    "preflight": preflight,
    "options": options,
    "sources": sources,
    "metrics": metrics,
    "measurements": measurements,
    "results": every_result,
    "attacks": attacks,
    "origins": origins,
    "recipes": recipes,
    "conformance": conformance,
    "values": chart.values_table,
}


if __name__ == "__main__":
    renew()
