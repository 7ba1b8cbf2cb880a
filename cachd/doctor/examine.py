"""Runs all checks at once, each with a deadline, and returns their findings in the order of the codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from cachd.config import Config, Examined
from cachd.doctor import credentials, limits, network, root, running, space
from cachd.doctor.at_once import MAX_AT_ONCE, at_once
from cachd.doctor.codes import Code
from cachd.doctor.endpoints import endpoints_of
from cachd.doctor.finding import Finding, State, of_error
from cachd.doctor.options import check_options
from cachd.doctor.running import Reported
from cachd.errors import CachdError, Unreachable
from cachd.store.layout import Layout
from cachd.store.root_lock import holder

_DISK_SECONDS = 5.0  # more than a check of the disk needs, beyond what a check of the network may take


@dataclass(frozen=True, slots=True)
class Node:
    """What is examined.

    `examined`: this node's options; None if the daemon is on another node, and then only what it reports is
    examined. `answer`: what the daemon at `server` answered, or why there is no answer. `is_named`: the user
    gave that address.
    """

    examined: Examined | None
    server: str
    is_named: bool
    answer: Reported | Unreachable


@dataclass(frozen=True, slots=True)
class Check:
    """One check: the code of the finding if it fails altogether, and the call that yields its findings."""

    code: Code
    call: Callable[[], Iterable[Finding]]

    def run(self) -> list[Finding]:
        """Its findings; one that says why there are none, if the check itself fails."""
        try:
            return list(self.call())
        except CachdError as error:
            return [of_error(self.code, error)]
        except OSError as error:
            what = f"it cannot be checked: {error}"
            return [Finding(self.code, State.wrong, what, "check the path, and the user that runs this")]


def examine(node: Node, seconds: float) -> list[Finding]:
    """The findings of all checks. None waits for more than `seconds` for any server."""
    checks = [*_of_daemon(node), *_of_node(node, seconds)]
    found = at_once([each.run for each in checks], _longest(node, seconds))
    findings = [
        finding
        for check, each in zip(checks, found, strict=True)
        for finding in ([of_error(check.code, each)] if isinstance(each, CachdError) else each)
    ]
    order = {code: number for number, code in enumerate(Code)}
    return sorted(findings, key=lambda finding: order[finding.code])


def _longest(node: Node, seconds: float) -> float:
    """How long a check may take that asks every server, in turns."""
    models = len(node.examined.loaded.config.models) if node.examined else 0
    entries = len(node.examined.loaded.config.sources) if node.examined else 0
    return _DISK_SECONDS + 3 * seconds * (1 + (models + entries) // MAX_AT_ONCE)


def _of_daemon(node: Node) -> Iterator[Check]:
    """The checks of what a daemon reports, or of its absence."""
    reported = node.answer
    if isinstance(reported, Unreachable):
        held = _holder(node.examined.loaded.config) if node.examined else ""
        absence = partial(running.check_absent, reported, node.server, held, is_named=node.is_named)
        yield Check(Code.daemon, absence)
        return
    yield Check(Code.daemon, partial(running.check_daemon, reported))
    if reported.refused:
        return
    yield Check(Code.configuration_in_force, partial(running.check_in_force, reported))
    yield Check(Code.required_models, partial(running.check_required, reported))
    yield Check(Code.model, partial(running.check_models, reported.models))
    if reported.capacity is not None:
        yield Check(Code.space, partial(running.check_capacity, reported.capacity))


def _of_node(node: Node, seconds: float) -> Iterator[Check]:
    """The checks of this node."""
    if node.examined is None:
        return
    loaded, config = node.examined.loaded, node.examined.loaded.config
    is_running = isinstance(node.answer, Reported) and node.answer.capacity is not None
    yield Check(Code.configuration, partial(check_options, node.examined))
    yield Check(Code.user, partial(root.check_user, config))
    if root.is_owner(config):
        yield from _of_root(config, is_running=is_running)
        yield Check(Code.secret_file, partial(credentials.check_secret_files, config))
        yield Check(Code.api_tokens, partial(credentials.check_api_tokens, config))
        yield Check(Code.hub_token, partial(credentials.check_hub_tokens, loaded, seconds))
        if config.informs_kubernetes:
            yield Check(Code.kubernetes, partial(_kubernetes, config, seconds))
        yield Check(Code.s3_credentials, partial(credentials.check_s3_credentials, loaded, seconds))
    yield Check(Code.open_files, partial(limits.check_open_files, config, _pid(config)))
    if not is_running:
        yield Check(Code.threads, partial(limits.check_threads, config))
    yield Check(Code.ca_file, partial(network.check_authorities, loaded))
    yield Check(Code.certificate, partial(network.check_certificate, config))
    yield Check(Code.proxy, partial(network.check_proxies, config, seconds))
    endpoints = endpoints_of(loaded)
    yield Check(Code.dns, partial(network.check_names, config, endpoints, seconds))
    yield Check(Code.endpoint, partial(_answered, node.examined, seconds))


def _kubernetes(config: Config, seconds: float) -> Iterable[Finding]:
    from cachd.doctor.kubernetes import check_kubernetes  # nobody else needs its code

    return check_kubernetes(config, seconds)


def _of_root(config: Config, *, is_running: bool) -> Iterator[Check]:
    """The checks of the root. Those of `capacity` and of models are the daemon's own while it runs."""
    yield Check(Code.root, partial(root.check_owner_and_mode, config))
    place = root.place_of(config)
    if not place.is_dir():
        return
    yield Check(Code.file_system, partial(root.check_file_system, config))
    yield Check(Code.hard_links, partial(root.check_hard_links, config))
    yield Check(Code.foreign_files, partial(root.check_foreign_files, config))
    yield Check(Code.kubelet, partial(space.check_kubelet, config))
    if not is_running:
        yield Check(Code.leases, partial(root.check_leases, config))
        yield Check(Code.inotify, partial(root.check_inotify, config))
        yield Check(Code.space, partial(space.check_space, config))
        yield Check(Code.model, lambda: running.check_models(running.left_behind(place)))


def _answered(examined: Examined, seconds: float) -> Iterator[Finding]:
    """Endpoints and the clock: the dates that the endpoints state are the clocks to compare with."""
    endpoints = endpoints_of(examined.loaded)
    answers = network.asked(examined.loaded.config, endpoints, seconds)
    yield from network.check_endpoints(endpoints, answers)
    yield from network.check_clock(answers)


def _holder(config: Config) -> str:
    """The running process that holds the root; empty if none does, or if that cannot be read."""
    try:
        return holder(Layout(root.place_of(config)).lock)
    except OSError:
        return ""


def _pid(config: Config) -> int | None:
    """The process id of the daemon that holds the root."""
    words = _holder(config).split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else None
