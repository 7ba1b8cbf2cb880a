"""Finds what is wrong with the options that were given, and says where each was set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cachd.config.models import Model
from cachd.config.options import Config
from cachd.errors import Invalid, Unavailable
from cachd.findings import Finding, key_of, sentence
from cachd.settings.given import Given, Giver
from cachd.sources.entries import Entry, doubled
from cachd.sources.trust import Authorities, reason_of

MAX_FINDINGS = 50  # in one refusal
_ENTRIES: Mapping[str, type[BaseModel]] = {"models": Model, "sources": Entry}


def refusal(findings: list[Finding], more: int) -> Invalid:
    """The error with one line for each finding. `more`: how many faults have no finding."""
    lines = [str(finding) for finding in sorted(findings)[:MAX_FINDINGS]]
    if more := more + len(findings[MAX_FINDINGS:]):
        lines.append(f"and {more} more")
    return Invalid("\n".join(lines), code="bad_option", hint="cachd options lists every option")


def faults(error: ValidationError, given: Given) -> list[Finding]:
    """A finding for each of pydantic's errors, at most MAX_FINDINGS."""
    return [_finding(dict(fault), given) for fault in error.errors(include_url=False)[:MAX_FINDINGS]]


def conflicts(config: Config, given: Given) -> list[Finding]:
    """A finding for each value that is valid alone, and wrong beside another option or on this node."""
    return [
        *_same_names(config.models, given),
        *_same_prefixes(config.sources, given),
        *_wrong_files(config, given),
    ]


def _finding(fault: Mapping[str, Any], given: Given) -> Finding:
    """The finding for one error of pydantic's."""
    loc = fault["loc"]
    entry = _ENTRIES.get(str(loc[0])) if len(loc) > 2 else None
    fields = {field.alias or name: field for name, field in (entry or Config).model_fields.items()}
    field = fields.get(str(loc[2 if entry else 0]))
    reason = sentence(fault, fields, _wanted(field) if field else "")
    return Finding(given.place(loc), key_of(loc), reason)


def _wanted(field: FieldInfo) -> str:
    """What a number must be, such as `a whole number from 1 to 256`; empty unless it is a bounded one."""
    least = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    most = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    is_range = field.annotation is int and None not in (least, most)
    return f"a whole number from {least} to {most}" if is_range else ""


def _same_names(models: Iterable[Model], given: Given) -> list[Finding]:
    """A finding for each model whose name an earlier model has."""
    findings = []
    first: dict[str, int] = {}
    for number, name in enumerate(model.spec.name for model in models):
        if first.setdefault(name, number) != number:
            loc = ("models", number)
            reason = f"models[{first[name]}] has the name {name}, too: give each model a name of its own"
            findings.append(Finding(given.place(loc), key_of(loc), reason))
    return findings


def _same_prefixes(entries: Iterable[Entry], given: Given) -> list[Finding]:
    """A finding for each entry whose prefix an earlier entry has."""
    findings = []
    for first, second in doubled(entries):
        loc = ("sources", second, "prefix")
        findings.append(Finding(given.place(loc), key_of(loc), f"sources[{first}] has this prefix, too"))
    return findings


def _wrong_files(config: Config, given: Given) -> list[Finding]:
    """A finding for each CA file that holds no certificates.

    A CA file that a variable of another tool names is usually the system's bundle. It is only searched for a
    certificate, because parsing a bundle takes 25 ms.
    """
    findings = []
    for key, path in (("ca_file", config.ca_file), ("s3_ca_file", config.s3_ca_file)):
        if path is None:
            continue
        authorities = Authorities(str(path))
        try:
            if given.settings[key].giver is Giver.ecosystem:
                authorities.check()
            else:
                authorities.context()
        except Unavailable as error:
            reason = f"{path} cannot be used: {reason_of(error)}: give a PEM file"
            findings.append(Finding(given.place((key,)), key, reason))
    return findings
