"""The parts of README.md that come from elsewhere: refs, options, metrics from code, figures from a run."""

from __future__ import annotations

from pathlib import Path

from cachd import config
from cachd.metrics import MEASURED, Metrics
from cachd.sources import entries
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
        "options": options(),
        "sources": sources(),
        "metrics": metrics(),
        "measurements": measurements(),
    }
    for name, content in parts.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{begin}{content}\n{end}{after}"
    return text


def options() -> str:
    rows = [
        f"| `{key}` | `{env}` | {_code(default)} | {text} |" for key, env, default, text in config.table()
    ]
    return "\n".join(["| Key | Environment | Default | Meaning |", "|---|---|---|---|", *rows])


def sources() -> str:
    rows = [f"| `{column}` | {schemes} | {text} |" for column, schemes, text in entries.columns()]
    return "\n".join(["| Column | Of | What it says |", "|---|---|---|", *rows])


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
