"""Prints models: the rows of a list, the facts about one model, its files, and the end of a pull."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachd.model.units import count_text
from cachd.terminal.amounts import age_text, duration_text, moment_of, moment_text, rate_text, size_text
from cachd.terminal.output import say, show_facts, show_table, warn
from cachd.terminal.preflight import finding_text
from cachd.terminal.table import Cell, Row

HEADINGS = ("NAME", "STATE", "SIZE", "PROGRESS", "RATE", "ETA", "USED BY", "REASON")
_WIDE = ("FILES", "VERIFIED", "PINNED", "WARNINGS", "REVISION", "AGE", "REF", "PATH")
WIDE_HEADINGS = (*HEADINGS[:-1], *_WIDE, HEADINGS[-1])
FILE_HEADINGS = ("FILE", "SIZE", "HERE", "DIGEST")
FEW_FILES = 20  # that are shown of a model when nobody asks for all
_FAILURE = "red"
# Of an error: facts that are sizes, and those that `show` has already said in other lines.
_SIZES = ("need", "usable", "free", "short", "size")
_SAID = ("code", "detail", "bytes_done", "bytes_total")
_JOBS = {"verification": "verifying", "warming": "warming"}
_WAITS = {
    "slot": "other pulls run, and it waits for its turn",
    "origin": "its source failed, and is asked again",
    "slow": "its source hardly sends",
    "space": "another process took the disk space that it waits for",
}


@dataclass(frozen=True, slots=True)
class Status:
    """How a model is, in figures: bytes that are here and all bytes, the rate now, and seconds until the end.

    `reason`: why it failed, or why it waits; empty otherwise.
    """

    name: str
    state: str
    done: int = 0
    total: int = 0
    rate: int = 0
    eta_seconds: float | None = None
    reason: str = ""

    @property
    def percent(self) -> str:
        """The progress in percent, rounded down; `-` before the size is known."""
        return f"{100 * self.done // self.total}%" if self.total else "-"


def status_of(model: Mapping[str, Any], now: Callable[[], float] = time.time) -> Status:
    """The figures in a model's document."""
    ready, pull = model["ready"], model["pull"]
    is_moving = pull is not None and pull["state"] not in ("ready", "failed", "cancelled")
    if is_moving or (pull and not ready):
        done, total = pull["bytes"]["done"], pull["bytes"]["total"]
    else:
        done = total = ready["bytes"] if ready else 0
    is_apart = ready or model["state"] == "damaged"
    return Status(
        name=model["name"],
        state=f"{model['state']}, {pull['state']}" if is_moving and is_apart else model["state"],
        done=done,
        total=total,
        rate=pull["rate_bytes_per_second"] if is_moving else 0,
        eta_seconds=pull["eta_seconds"] if is_moving else None,
        reason=reason_of(model, now),
    )


def reason_of(model: Mapping[str, Any], now: Callable[[], float] = time.time) -> str:
    """Why a model is damaged, why it failed, or why its pull waits; empty while all is well."""
    damage, of_pull = model["damage"], _reason_of_pull(model, now)
    return "; its repair: ".join(filter(None, (damage["reason"], of_pull))) if damage else of_pull


def _reason_of_pull(model: Mapping[str, Any], now: Callable[[], float]) -> str:
    """Why the newest pull of a model waits or failed; empty if it does neither."""
    pull = model["pull"]
    if pull and pull["waits"]:
        waits = pull["waits"]
        until = moment_of(waits["until"]) if waits["until"] else None
        return waits_text(waits["reason"], until, waits["detail"], now)
    if pull and pull["error"]:
        error = pull["error"]
        before = "the newest pull failed: " if model["ready"] else ""
        return f"{before}{error['detail']} ({error['code']}){_again(model, now)}"
    return ""


def _again(model: Mapping[str, Any], now: Callable[[], float]) -> str:
    """When the daemon itself starts a pull that failed again, or how to ask for it; empty if that is vain."""
    if again := _retry_in(model["pull"], now):
        return f"; asked again in {again}"
    return "" if model["final"] else f"; to ask again: cachd pull {model['pull']['ref']}"


def _retry_in(pull: Mapping[str, Any], now: Callable[[], float]) -> str:
    """How long until the daemon itself starts a failed pull again; empty if it does not."""
    retry_at = pull["retry_at"]
    return duration_text(max(moment_of(retry_at) - now(), 1.0)) if retry_at else ""


def waits_text(
    reason: str, until: float | None, detail: str | None, now: Callable[[], float] = time.time
) -> str:
    """Why and how long (until a Unix time) a pull waits."""
    left = until - now() if until else 0.0
    again = f" in {duration_text(left)}" if left >= 0.05 else ""
    return f"{_WAITS.get(reason, reason)}{again}{f': {detail}' if detail else ''}"


def model_row(model: Mapping[str, Any]) -> Row:
    """The cells of HEADINGS."""
    return [*_first_cells(model), Cell(_reason_in_row(model), _FAILURE)]


def wide_row(model: Mapping[str, Any]) -> Row:
    """The cells of WIDE_HEADINGS."""
    ready, pull = model["ready"], model["pull"]
    files = ready["files"] if ready else pull["files"]["total"] if pull else 0
    revision = (ready or pull or {}).get("revision")
    return [
        *_first_cells(model),
        str(files or "-"),
        yes(model["verified"] if ready else None),
        pinned_text(model),
        _warnings(ready),
        revision[:12] if revision else "-",
        age_text(ready["published_at"]) if ready else "-",
        model["ref"],
        file_or_directory(model),
        Cell(_reason_in_row(model), _FAILURE),
    ]


def _reason_in_row(model: Mapping[str, Any]) -> str:
    """As `reason_of`; of a model with which all is well, the first finding for which an engine refuses it."""
    findings = (model["ready"] or {}).get("preflight", ())
    refused = (f"preflight: {finding_text(each)}" for each in findings if each["level"] == "refused")
    return reason_of(model) or next(refused, "")


def _warnings(ready: Mapping[str, Any] | None) -> str:
    """How many warnings a model has, those of its preflight included."""
    return str(len(ready["warnings"]) + len(ready.get("preflight", ())) or "-") if ready else "-"


def table(models: Sequence[Mapping[str, Any]], *, is_wide: bool) -> tuple[Sequence[str], list[Row]]:
    """The headings and the rows of a list of models."""
    if is_wide:
        return WIDE_HEADINGS, [wide_row(model) for model in models]
    return HEADINGS, [model_row(model) for model in models]


def line_of(model: Mapping[str, Any]) -> str:
    """One line about a model, for a log of changes."""
    status = status_of(model)
    size = f"{status.percent} of {size_text(status.total)}" if status.total else ""
    rate = rate_text(status.rate) if status.rate else ""
    eta = (
        f"{duration_text(status.eta_seconds)} left" if status.eta_seconds is not None and status.rate else ""
    )
    return "  ".join(filter(None, (status.name, status.state, size, rate, eta, status.reason)))


def _first_cells(model: Mapping[str, Any]) -> list[str | Cell]:
    status = status_of(model)
    is_bad = model["state"] in ("failed", "damaged", "refused")
    return [
        status.name,
        Cell(status.state, _FAILURE) if is_bad else status.state,
        size_text(status.total) if status.total else "-",
        _job(model) or status.percent,
        rate_text(status.rate) if status.rate else "-",
        duration_text(status.eta_seconds) if status.eta_seconds is not None else "-",
        used_by(model),
    ]


def _job(model: Mapping[str, Any]) -> str:
    """The progress of a verification or a warming; empty if none runs."""
    for key, word in _JOBS.items():
        if (job := model[key]) and job["state"] == "running":
            total = job["bytes"]["total"]
            return f"{word} {100 * job['bytes']['done'] // total if total else 0}%"
    return ""


def used_by(model: Mapping[str, Any]) -> str:
    """Who uses or keeps a model: a pod, a process, the holders of leases, a pin."""
    holders = [lease["holder"] or "a lease" for lease in model["leases"]]
    user = [model["in_use_by"] or "open files"] if model["in_use"] else []
    pin = ["a pin"] if model["pinned"] else []
    return ", ".join([*user, *holders, *pin]) or "-"


def pinned_text(model: Mapping[str, Any]) -> str:
    """Whether a model is pinned, and who pinned it."""
    by = ", ".join(model.get("pinned_by") or ())
    return f"by {by}" if by else yes(model["pinned"])


def file_or_directory(model: Mapping[str, Any]) -> str:
    """The path to give to an engine: the model's only file, else its directory."""
    return str(model["file"] or model["path"])


def show_model(model: Mapping[str, Any], files: Sequence[Mapping[str, Any]], total: int) -> None:
    """Print one fact about a model on each line, then a table of its files, of which there are `total`."""
    show_facts(_facts(model))
    if files:
        say("")
        show_files(files, total, name=model["name"])


def show_files(files: Sequence[Mapping[str, Any]], total: int, *, name: str = "") -> None:
    """Print FILE SIZE HERE DIGEST of each file, and how many of the `total` are not among them."""
    rows = [
        (each["path"], size_text(each["bytes"]), yes(each["here"]), each["digest"] or _computed(each))
        for each in files
    ]
    show_table(FILE_HEADINGS, rows)
    if total > len(files):
        more = f"; cachd show {name} --files shows all" if name else ""
        say(f"and {count_text(total - len(files), 'more file')}{more}")


def _computed(file: Mapping[str, Any]) -> str:
    return f"none stated; sha256:{file['sha256']} computed" if file["sha256"] else "none stated"


def _facts(model: Mapping[str, Any]) -> dict[str, object]:
    """The facts about a model, in the order in which they are printed."""
    ready = model["ready"]
    facts: dict[str, object] = {k: model[k] for k in ("name", "state", "ref", "path", "file")}
    facts["reason"] = reason_of(model)
    facts["verified"] = yes(model["verified"] if ready else None)
    if model["verified_by"]:
        facts["verified_by"] = ", ".join(f"{by} ({files})" for by, files in model["verified_by"].items())
    facts |= {"pinned": pinned_text(model), "in_use": yes(model["in_use"])}
    facts |= {"used by": used_by(model)}
    if ready:
        facts["immutable_path"] = model["immutable_path"]
        facts |= {k: ready[k] for k in ("revision", "manifest", "files")}
        facts["published_at"] = moment_text(ready["published_at"])
        facts["size"] = size_text(ready["bytes"])
        refs = f" ({', '.join(ready['hub']['refs'])})" if ready["hub"]["refs"] else ""
        facts["hub"] = f"{ready['hub']['repo']}@{ready['hub']['commit'][:12]}{refs}"
    for before in model["previous"][:1]:
        facts["previous"] = f"{before['ref']} {before['revision']}"
    if ready:
        facts["resident"] = size_text(model["resident_bytes"])
        facts["layout"] = ready.get("layout")
        facts["left out"] = _left_out(ready)
        facts |= {"warning" if n < 2 else f"warning {n}": w for n, w in enumerate(ready["warnings"], 1)}
        for number, each in enumerate(ready.get("preflight", ()), 1):
            facts["preflight" if number < 2 else f"preflight {number}"] = finding_text(each)
        facts["advice"] = ready["advice"]
    facts |= {f"damage {k}": v for k, v in (model["damage"] or {}).items()}
    if model["verified_at"]:
        facts["verified_at"] = moment_text(model["verified_at"])
    facts |= _facts_of_pull(model) if model["pull"] else {}
    return {name: fact for name, fact in facts.items() if fact not in (None, "")}


def _facts_of_pull(model: Mapping[str, Any]) -> dict[str, object]:
    pull = model["pull"]
    count = pull["bytes"]
    facts: dict[str, object] = {
        "pull": f"{pull['state']}: {size_text(count['done'])} of {size_text(count['total'])},"
        f" {size_text(count['fetched'] or 0)} fetched, {size_text(count['resumed'] or 0)} resumed"
    }
    if not pull["ended_at"]:
        eta = pull["eta_seconds"]
        ends = f", ends in {duration_text(eta)}" if eta is not None else ""
        facts["rate"] = f"{rate_text(pull['rate_bytes_per_second'])} in the last seconds{ends}"
    if pull["error"]:
        facts["asked again"] = _asked_again(model)
        facts |= {
            f"error {k.removesuffix('_bytes')}": _fact_text(k, v)
            for k, v in pull["error"].items()
            if k not in _SAID
        }
    return facts


def _asked_again(model: Mapping[str, Any], now: Callable[[], float] = time.time) -> str:
    """Whether a pull that failed is tried again, by whom and when."""
    pull = model["pull"]
    if again := _retry_in(pull, now):
        return f"by cachd itself, in {again}"
    if model["final"]:
        return "no, it is final: the same pull would fail again until its cause is gone"
    return f"not by itself: cachd pull {pull['ref']} tries again"


def _fact_text(key: str, value: object) -> str:
    """A fact of an error for people."""
    if key in _SIZES and isinstance(value, int):
        return size_text(value)
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def warn_of(ready: Mapping[str, Any]) -> None:
    """Print on standard error what a user of a model that is ready may want to know."""
    for warning in ready["warnings"]:
        warn(f"warning: {warning}", style="yellow")
    for finding in ready.get("preflight", ()):
        warn(f"preflight: {finding_text(finding)}", style="yellow")
    if left_out := _left_out(ready):
        warn(f"left out: {left_out}")
    if ready["advice"]:
        warn(f"advice: {ready['advice']}")


def _left_out(ready: Mapping[str, Any]) -> str:
    """What patterns and weights left out, for people; empty if nothing."""
    if not (gone := ready["left_out"]):
        return ""
    forms = f" ({', '.join(gone['weights'])})" if gone["weights"] else ""
    return f"{count_text(gone['files'], 'file')}, {size_text(gone['bytes'])}{forms}"


def pulled_text(model: Mapping[str, Any]) -> str:
    """About the pull of a model that is ready: its bytes, seconds and rate, then what was verified."""
    ready, pull = model["ready"], model["pull"]
    if not (pull and pull["began_at"] and pull["ended_at"]):
        return here_text(model)
    seconds = moment_of(pull["ended_at"]) - moment_of(pull["began_at"])
    fetched = pull["bytes"]["fetched"] or 0
    rate = f" ({rate_text(fetched / seconds)})" if fetched and seconds > 0 else ""
    received = "" if fetched == ready["bytes"] else f", of which {size_text(fetched)} were fetched"
    return f"{_size(model)}{received}, in {duration_text(seconds)}{rate}\n  {verified_text(ready)}"


def here_text(model: Mapping[str, Any]) -> str:
    """About a model that was ready before somebody asked for it: its size, then what was verified."""
    return f"{_size(model)}, here already\n  {verified_text(model['ready'])}"


def _size(model: Mapping[str, Any]) -> str:
    ready = model["ready"]
    return f"{model['name']}: {size_text(ready['bytes'])} in {count_text(ready['files'], 'file')}"


def verified_text(ready: Mapping[str, Any]) -> str:
    """How many files of a model are verified, and by what."""
    verified, by = digests_text(ready["verified_by"])
    if not verified:
        return "no file is verified, because the source states no digest"
    return f"{verified} of {count_text(ready['files'], 'file')} verified ({by})"


def digests_text(verified_by: Mapping[str, int]) -> tuple[int, str]:
    """How many files have a digest, and how many have one of each algorithm, in words."""
    by = {algorithm: files for algorithm, files in verified_by.items() if algorithm != "none"}
    return sum(by.values()), ", ".join(f"{algorithm}: {files}" for algorithm, files in by.items())


def show_verification(name: str, verification: Mapping[str, Any]) -> None:
    """Print one line for each damaged file, then the result."""
    for each in verification["damaged"]:
        say(f"{each['path'] or name}: {each['wrong']}")
    if verification["error"]:
        say(verification["error"]["detail"])
    say(f"{name} {verification['state']} {size_text(verification['bytes']['done'])}")


def yes(value: object) -> str:
    """A flag for people; `-` if it does not apply."""
    return "-" if value is None else "yes" if value else "no"
