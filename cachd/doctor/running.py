"""Checks what a running daemon reports about itself and its models, and what a stopped one left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachd import files
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, of_error, ok
from cachd.doctor.root import leases_work, no_leases, too_few_watches
from cachd.doctor.space import space_findings
from cachd.errors import CachdError, Forbidden, error_of
from cachd.model import count_text
from cachd.pod.mount import MAX_BYTES
from cachd.store.layout import Layout

Document = Mapping[str, Any]
_BAD = ("failed", "damaged", "refused")


@dataclass(frozen=True, slots=True)
class Reported:
    """What the daemon at `server` answered; a field is None if it refused that.

    `probes`: the error of each probe that failed, by its path. `options`: the document of `GET /v1/options`.
    """

    server: str
    capacity: Document | None = None
    options: Document | None = None
    models: Sequence[Document] = ()
    probes: Mapping[str, CachdError] = field(default_factory=dict)
    refused: CachdError | None = None

    @property
    def file(self) -> Document:
        """What it says about its configuration file; empty if it refused that."""
        return dict((self.options or {}).get("file") or {})

    def option(self, key: str) -> object:
        """The value of an option in force; None if it is not known."""
        options = (self.options or {}).get("options") or ()
        return next((each.get("value") for each in options if each.get("key") == key), None)


def check_absent(error: CachdError, server: str, holder: str, *, is_named: bool) -> Iterator[Finding]:
    """A daemon that does not answer. `holder`: the process that holds the root; empty if none does."""
    if holder:
        what = f"{error.detail}; but {holder} holds the root"
        hint = f"see its log, and give its address with --url if it is not {server}"
        yield Finding(Code.daemon, State.wrong, what, hint, subject=server, error=error.code)
    else:
        state = State.wrong if is_named else State.warning
        yield of_error(Code.daemon, error, subject=server, state=state)


def check_daemon(reported: Reported) -> Iterator[Finding]:
    """Whether it answers, and whether it can write."""
    server = reported.server
    if reported.refused:
        hint = "give a token that may read: --token-file, CACHD_TOKEN_FILE or CACHD_TOKEN"
        is_denied = isinstance(reported.refused, Forbidden)
        yield of_error(Code.daemon, reported.refused, subject=server, hint=hint if is_denied else "")
    for path in ("/livez", "/readyz"):
        error = reported.probes.get(path)
        if error and not (reported.refused and error.code == reported.refused.code):
            yield of_error(Code.daemon, error, subject=server, hint=error.hint or "see the log of the daemon")
    if not (reported.refused or reported.probes.keys() & {"/livez", "/readyz"}):
        yield ok(Code.daemon, f"the daemon at {server} answers, and its disk is writable", subject=server)


def check_in_force(reported: Reported) -> Iterator[Finding]:
    """Whether the daemon uses its configuration file as it is, now or after a restart."""
    if reported.options is None:
        what = "its configuration was not checked: that needs an admin's token"
        yield Finding(Code.configuration_in_force, State.warning, what, "give one with --token-file")
        return
    file = reported.file
    error = file.get("error")
    if isinstance(error, dict):
        what = f"the configuration file on disk is not in force: {error.get('detail')}"
        if file.get("last_good"):
            what += f"; the daemon started with the last good one, of {file.get('loaded_at')}"
        hint = f"{error.get('hint') or 'correct the file'}; the daemon reads the file again when it changes"
        code = str(error.get("code", ""))
        yield Finding(Code.configuration_in_force, State.wrong, what, hint, error=code)
    else:
        yield ok(Code.configuration_in_force, "the daemon uses the configuration file as it is")
    if waiting := file.get("waiting_for_restart"):
        what = f"these options take effect when the daemon restarts: {', '.join(map(str, waiting))}"
        hint = "restart the daemon; pods keep reading meanwhile, and pulls resume afterwards"
        yield Finding(Code.restart_needed, State.warning, what, hint)


def check_capacity(capacity: Document) -> Iterator[Finding]:
    """The space, the leases and the watches that the daemon reports."""
    yield from space_findings(capacity, over=State.wrong)
    if capacity["in_use_reported_by"] == "kernel":
        yield leases_work()
    else:
        yield no_leases("see the finding about the file system")
    views = capacity["views"]
    if views["unwatched"]:
        unwatched = count_text(views["unwatched"], "directory", "directories")
        what = f"the kernel does not watch {unwatched} of the views: {views['reason']}"
        is_instances = "max_user_instances" in str(views["reason"])
        yield too_few_watches(what, "max_user_instances" if is_instances else "max_user_watches")
    else:
        yield ok(Code.inotify, "the kernel watches all directories of the views")


def check_required(reported: Reported) -> Iterator[Finding]:
    """Whether every required model is ready."""
    if error := reported.probes.get("/readyz?set=required"):
        hint = "see the findings about these models, or cachd show NAME"
        yield of_error(Code.required_models, error, hint=error.hint or hint)
    else:
        yield ok(Code.required_models, "every required model is ready")


def check_models(models: Sequence[Document]) -> Iterator[Finding]:
    """What each pull or model that failed failed with."""
    bad = [finding for model in models if (finding := _model(model))]
    yield from bad
    if not bad:
        yield ok(Code.model, f"{count_text(len(models), 'model')}, and none has failed")


def _model(model: Document) -> Finding | None:
    """The finding of the document of a model, of the API or of a status file; None for a sound one."""
    name, state = str(model.get("name")), str(model.get("state"))
    failed = (model.get("pull") or {}).get("error") or model.get("error")
    if isinstance(failed, dict) and state != "evicted":
        error = error_of(failed)
        what = f"{name} {'has' if state == 'failed' else 'is'} {state}: {error.detail}"
        hint = error.hint or f"cachd show {name} has the details; {_again(model)}"
        if state in _BAD:
            hint += f"; if nobody needs the model, cachd rm {name}"
        kind = State.wrong if state in _BAD else State.warning
        return Finding(Code.model, kind, what, hint, subject=name, error=error.code)
    if state in _BAD:
        damage = (model.get("damage") or {}).get("reason") or "see cachd show"
        what = f"{name} is {state}: {damage}"
        hint = f"cachd wait {name} waits for the repair; cachd pull starts one"
        return Finding(Code.model, State.wrong, what, hint, subject=name, error=state)
    return None


def _again(model: Document) -> str:
    """When the daemon itself starts the failed pull of a model again, or how to ask for it."""
    pull = model.get("pull") or model
    if at := pull.get("retry_at"):
        return f"the daemon asks its source again at {at}"
    return f"cachd pull {pull.get('ref') or 'REF'} asks its source again"


def left_behind(root: Path) -> list[Document]:
    """The documents of status/, which a daemon keeps for pods, and which stay when it stops."""
    found: list[Document] = []
    for path in sorted(Layout(root).status.glob("[!.]*.json")):
        try:
            document = files.document(path, at_most=MAX_BYTES)
        except files.UNREADABLE:
            continue
        if isinstance(document, dict):
            found.append({"name": path.stem, **document})
    return found
