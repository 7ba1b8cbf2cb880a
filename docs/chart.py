"""Renders what follows from the Helm chart and from the daemon's options: `make manifests`, `make docs`.

- values.schema.json: models and options follow from the code, the help from values.yaml
- daemonset/*.yaml and admission: the manifests for kustomize, rendered by helm from ci/kustomize-values.yaml
- daemonset/monitoring/dashboard.json, which docs/dashboard.py makes
- chart/files: alerts and dashboard, copied from daemonset/monitoring
- chart/README.md: the table of values, which docs/render.py puts there
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from cachd.config import Config, Model
from cachd.policy.prefixes import Prefix
from cachd.sources.entries import Entry
from docs.dashboard import DASHBOARD, dashboard
from tests.ground.helm import helm_binary

DAEMONSET = Path(__file__).parent.parent / "daemonset"
CHART = DAEMONSET / "chart"
VALUES, SCHEMA = CHART / "values.yaml", CHART / "values.schema.json"
BASE_VALUES = CHART / "ci/kustomize-values.yaml"
MONITORING = DAEMONSET / "monitoring"
COPIED = {"rules.yaml": MONITORING / "rules.yaml", "dashboard.json": DASHBOARD}
BASE = {
    name: DAEMONSET / name
    for name in ("namespace.yaml", "serviceaccount.yaml", "configmap.yaml", "daemonset.yaml", "service.yaml")
} | {"admission.yaml": DAEMONSET / "admission/cache-mounts.yaml"}

# Options that follow from other values of the chart.
CHART_SETS = {
    *("root", "config", "models", "listen", "kubelet_config"),
    *("hub_listen", "hub_allow", "hub_share"),
    *("tls_cert_file", "tls_key_file", "tls_client_ca_file"),
    *("node_labels", "node_condition", "node_events", "startup_taint", "node_name"),
}
PREWARM_LACKS = {"required", "warm"}  # fields of an entry of `models` that a call of the API has not
HELP = "# -- "
# The version is set in kustomization.yaml. No checksum follows config.yaml where kustomize patches it.
OF_HELM_ALONE = re.compile(
    r"^ +(?:helm\.sh/chart|app\.kubernetes\.io/(?:managed-by|version)|checksum/config): .*\n", re.MULTILINE
)
HEAD = "# Made from chart/templates by `make manifests`: change it there.\n"


@dataclass(frozen=True, slots=True)
class Value:
    """A documented value of the chart: its keys, its default and its help."""

    path: tuple[str, ...]
    default: Any
    help: str

    @property
    def name(self) -> str:
        return ".".join(self.path)


def values() -> Iterator[Value]:
    """The values of values.yaml in their order."""
    return documented(VALUES.read_text())


def documented(text: str) -> Iterator[Value]:
    """Values in their order, each with the comment above it. Raises ValueError if one has none."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, path: tuple[str, ...]) -> Iterator[Value]:
        for key, value in node.value:
            here = (*path, key.value)
            if help_text := _comment_above(lines[: key.start_mark.line]):
                yield Value(here, _plain(value), help_text)
            elif isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, here)
            else:
                raise ValueError(f"{'.'.join(here)} has no help: a line that begins with {HELP!r} above it")

    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return walk(root, ())


def _comment_above(lines: list[str]) -> str:
    """The help that the last lines are, if they are comments that begin with HELP."""
    found: list[str] = []
    for line in reversed(lines):
        if not line.strip().startswith("# "):
            return ""
        found.insert(0, line.strip().removeprefix(HELP).removeprefix("# "))
        if line.strip().startswith(HELP):
            return " ".join(found)
    return ""


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def values_table() -> str:
    """Each value of the chart with its default and its help."""
    rows = [f"| `{value.name}` | `{json.dumps(value.default)}` | {value.help} |" for value in values()]
    return "\n".join(["| Value | Default | Meaning |", "|---|---|---|", *rows])


# --- the schema ---


def schema() -> str:
    """values.schema.json with what follows from elsewhere as it should be now."""
    document = json.loads(SCHEMA.read_text())
    for value in values():
        at = document
        for key in value.path:
            at = at["properties"][key]
        at["description"] = value.help
    document["$defs"] |= {
        "options": _object(Config.model_fields, CHART_SETS),
        "models": {"type": "array", "items": _object(Model.model_fields, set())},
        "prewarmed": {"type": "array", "items": _object(Model.model_fields, PREWARM_LACKS)},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _object(fields: dict[str, FieldInfo], left_out: set[str]) -> dict[str, Any]:
    """A mapping that has these fields and no others."""
    taken = {field.alias or name: field for name, field in fields.items() if name not in left_out}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, field in taken.items() if field.is_required()],
        "properties": {name: _option(field) for name, field in taken.items()},
    }


def _option(field: FieldInfo) -> dict[str, Any]:
    """What a field takes in YAML. Texts that the daemon parses, such as sizes, are any text here."""
    kind, help_text = field.annotation, {"description": field.description}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind)), **help_text}
    if get_origin(kind) is dict:
        named, _ = get_args(kind)
        limits: dict[str, Any] = {name: {"type": ["number", "string"]} for name in get_args(named)}
        return {"type": "object", "additionalProperties": False, "properties": limits, **help_text}
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        items = _object(Entry.model_fields, set()) if of is Entry else {"type": "string", "minLength": 1}
        return {"type": "array", "items": items, **help_text}
    if kind is bool:
        return {"type": "boolean", **help_text}
    if kind is int and not any(hasattr(mark, "func") for mark in field.metadata):
        names = {Ge: "minimum", Le: "maximum"}
        bounds = {names[type(m)]: getattr(m, type(m).__name__.lower()) for m in field.metadata}
        return {"type": "integer", **bounds, **help_text}
    text = str(kind)
    if "tuple[str, ...]" in text and "Optional" in text:
        return {"type": "array", "items": {"type": "string", "minLength": 1}, **help_text}
    if "bool" in text:
        return {"type": ["boolean", "string", *(["array"] if "tuple" in text else [])], **help_text}
    if kind is Prefix or "str" in text or "Path" in text or ("Literal" in text and "int" not in text):
        least = {"minLength": 1} if field.is_required() else {}
        return {"type": "string", **least, **help_text}
    return {"type": ["number", "string"], **help_text}


# --- the manifests for kustomize ---


def manifests() -> dict[Path, str]:
    """The files that kustomize reads, as the chart makes them."""
    rendered = subprocess.run(
        [
            *(helm_binary() or "helm", "template", "cachd", CHART, "--namespace", "cachd"),
            *("--values", BASE_VALUES, "--set", "admissionPolicy.enabled=true", "--kube-version", "1.30"),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    parts: dict[str, str] = {}
    for document in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        source, _, text = document.partition("\n")
        name = source.rpartition("/")[2]
        text = OF_HELM_ALONE.sub("", text).strip() + "\n"
        parts[name] = f"{parts[name]}---\n{text}" if name in parts else text
    return {file: HEAD + parts[name] for name, file in BASE.items()}


def renew() -> None:
    """Write every file that follows from the chart."""
    SCHEMA.write_text(schema())
    DASHBOARD.write_text(dashboard())
    for name, source in COPIED.items():
        if source.exists():
            (CHART / "files" / name).write_text(source.read_text())
    for file, text in manifests().items():
        file.write_text(text)


if __name__ == "__main__":
    renew()
