"""The daemon in this process: what its signals do, what it logs and measures, and why it does not start."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from cachd.api.tls import Certificate, TlsFiles
from cachd.config import Loaded, read
from cachd.daemon.last_good import read_or_last_good
from cachd.daemon.parts import Daemon, assembled
from cachd.daemon.reload import Reload
from cachd.daemon.serve import _interrupt, _poll, _request, _scrape, _tokens, serve
from cachd.errors import Forbidden, InUse, Unavailable
from cachd.kernel.notices import Notices
from cachd.report.events import EventLog
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from cachd.upkeep.prewarm import Prewarm
from tests.conftest import spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.origin.certificates import Tls, certify
from tests.ground.site import until
from tests.test_notices_sent import Manager
from tests.test_waiting_for_roots import answered, free_port, held, status, waiting_threads

PATIENCE_SECONDS = 60.0
MIB = 1 << 20
REACH = ["127.0.0.0/8", "http://127.0.0.1/"]


@pytest.fixture
def hang_ups(stops: None) -> Iterator[list[int]]:
    """The SIGHUPs that nobody else handles. What `serve` changes of this process is undone at the end."""
    log, handlers, collected = structlog.get_config(), logging.root.handlers[:], gc.get_threshold()
    before, seen = signal.getsignal(signal.SIGHUP), list[int]()
    signal.signal(signal.SIGHUP, lambda number, _frame: seen.append(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until a daemon handles it
    yield seen
    signal.signal(signal.SIGHUP, before)
    gc.unfreeze()
    gc.set_threshold(*collected)
    structlog.configure(**log)
    logging.root.handlers[:] = handlers


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """The service manager that the environment names."""
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.socket.close()


def served(loaded: Loaded, act: Callable[[], Any], **how: bool) -> Any:
    """Serve in this thread while `act` runs in another, then stop. Returns what `act` returned."""

    def acted() -> Any:
        try:
            return act()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as actor:
        acting = actor.submit(acted)
        serve(loaded, **how)
        return acting.result(PATIENCE_SECONDS)


def logged(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The log lines since the last question, as JSON."""
    return [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]


def alive(port: int) -> None:
    """Wait until the daemon answers."""
    until(lambda: answered(port))
    assert status(port, "/livez") == (200, {"status": "alive"})


def options(port: int) -> dict[str, Any]:
    _, document = status(port, "/v1/options")
    assert isinstance(document, dict)
    return document


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as answer:
        text = answer.read().decode()
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


# --- the whole daemon ---


def test_a_daemon_serves_reloads_at_a_hang_up_and_stops_at_a_signal(
    root: Path, tmp_path: Path, hang_ups: list[int], manager: Manager, capfd: pytest.CaptureFixture[str]
) -> None:
    port, file = free_port(), tmp_path / "cachd.yaml"
    file.write_text(f"listen: 127.0.0.1:{port}\nlog_format: json\nreserve_free: 0\n")

    def act() -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        alive(port)
        first, heard = options(port), manager.heard()
        assert metrics(port)["cachd_config_in_force"] == 1
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: heard.extend(manager.heard()) or heard.count("READY=1") > 1)
        return first, options(port), heard

    first, second, heard = served(read(config=file, root=root), act)
    heard += manager.heard()
    assert [each.partition("\n")[0] for each in heard] == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert second["file"]["loaded_at"] != first["file"]["loaded_at"], "the unchanged file was loaded again"
    assert next(e for e in first["options"] if e["key"] == "log_format")["value"] == "json"
    events = [entry["event"] for entry in logged(capfd)]
    assert (events.index("listening") > 0, events[-1]) == (True, "stopped")
    assert hang_ups == []
    assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == (10_000, 5, 20)
    assert json.loads(Layout(root).last_good.read_text())["keys"]["log_format"] == "json"
    assert not answered(port)


def test_a_daemon_that_begins_with_its_last_good_configuration_says_so(
    root: Path, tmp_path: Path, hang_ups: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    port, file = free_port(), tmp_path / "cachd.yaml"
    file.write_text(f"listen: 127.0.0.1:{port}\nlog_format: json\nreserve_free: 0\n")
    served(read(config=file, root=root), lambda: alive(port))
    assert "last good configuration in force" not in [each["event"] for each in logged(capfd)]
    file.write_text("streams: many\n")
    served(read_or_last_good(config=file, root=root), lambda: alive(port))
    (line,) = [each for each in logged(capfd) if each["event"] == "last good configuration in force"]
    assert (line["level"], line["code"]) == ("error", "bad_option")
    assert "streams" in line["reason"]
    assert line["kept_at"].startswith("20")


def test_while_another_process_has_the_root_a_daemon_waits_or_ends(
    root: Path, hang_ups: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with DiskStore(root):  # it makes the root one of cachd
        lock = Layout(root).lock
    loaded = read(root=root, listen="127.0.0.1:0", log_format="json")

    def act() -> None:
        until(lambda: "waiting" in waiting_threads())
        os.kill(os.getpid(), signal.SIGHUP)

    with held(lock):
        served(loaded, act)
        assert [each["event"] for each in logged(capfd)][-1] == "stopped"
        assert hang_ups == [], "before the options are loaded, a hang-up is ignored"
        with pytest.raises(InUse):
            serve(loaded, waits=False)


@pytest.mark.usefixtures("hang_ups")
def test_a_daemon_on_which_anybody_could_write_does_not_start(root: Path, tmp_path: Path) -> None:
    loaded = read(root=root, listen="0.0.0.0:0", tls_cert_file=tmp_path / "absent")
    with pytest.raises(Forbidden):
        serve(loaded)
    assert os.listdir(root) == []


# --- its parts ---


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    with assembled(read(root=root, reserve_free=0, allow=REACH).config) as parts:
        yield parts


def test_a_stop_ends_the_pulls_first_and_then_the_waits_for_events(daemon: Daemon, origin: Origin) -> None:
    held_at = origin.hold("/it", after=1000)
    events, seen = EventLog(), list[bool]()
    pull = daemon.pulls.start(spec_of(origin.add("/it", noise(MIB))))
    assert pull is not None
    pull.done.add_done_callback(lambda _: seen.append(events.is_closed))
    assert held_at.reached.wait(PATIENCE_SECONDS)
    _interrupt(daemon, events)
    with pytest.raises(Unavailable, match="interrupted by a stop"):
        pull.done.result(PATIENCE_SECONDS)
    assert (seen, events.is_closed) == ([False], True)


def test_a_scrape_has_what_is_here_and_what_is_under_way(
    daemon: Daemon, origin: Origin, root: Path, tmp_path: Path
) -> None:
    loaded = read(root=root, reserve_free=0, allow=REACH)
    reload = Reload(loaded, daemon, now=lambda: 77.0)
    prewarm = Prewarm(daemon.pulls, daemon.store, daemon.warms, reload.poll)
    bare = _scrape(daemon, prewarm, reload, None, None, None)
    assert (bare.is_config_in_force, bare.is_config_loaded, bare.config_loaded_at) == (True, True, 77.0)
    assert (bare.certificate_expires_at, bare.is_certificate_in_force) == (None, None)
    assert (bare.are_tokens_in_force, bare.are_signals_written) == (True, None)
    assert (bare.waiting_options, bare.required_absent, bare.done, bare.eta) == (0, 0, {}, {})

    pem, held_at = tmp_path / "tls.pem", origin.hold("/it", after=1000)
    certify(pem, Tls())
    certificate, absent = (
        Certificate(TlsFiles(pem, pem)),
        _tokens(read(token_file=tmp_path / "absent").config),
    )
    assert daemon.pulls.start(spec_of(origin.add("/it", noise(MIB))))
    assert held_at.reached.wait(PATIENCE_SECONDS)
    full = _scrape(daemon, prewarm, reload, absent, certificate, None)
    assert (full.certificate_expires_at, full.is_certificate_in_force) == (certificate.expires_at, True)
    assert not full.are_tokens_in_force
    assert full.done.keys() == {"it"}
    assert None not in full.eta.values(), "a time that is not known is left out"


def test_of_the_required_models_those_that_are_not_ready_are_counted(
    origin: Origin, root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cachd.yaml"
    refs = [origin.add(f"/{name}", noise(64)) for name in ("here", "late", "free")]
    origin.hold("/late", after=1)
    listed = [{"ref": ref, "name": ref[-4:], "required": not ref.endswith("free")} for ref in refs]
    file.write_text(json.dumps({"models": listed, "reserve_free": 0, "allow": REACH}))
    loaded = read(config=file, root=root)
    with assembled(loaded.config) as daemon:
        reload = Reload(loaded, daemon)
        prewarm = Prewarm(daemon.pulls, daemon.store, daemon.warms, reload.poll)
        prewarm.start()
        try:
            until(lambda: daemon.store.names.get("here") and daemon.store.names.get("free"))
            assert _scrape(daemon, prewarm, reload, None, None, None).required_absent == 1
        finally:
            prewarm.close()


def test_the_file_of_the_tokens_is_read_at_the_start(tmp_path: Path) -> None:
    assert _tokens(read().config) is None
    with capture_logs() as logs:
        tokens = _tokens(read(token_file=tmp_path / "absent").config)
    assert tokens is not None
    assert len(logs) == 1, "its errors are in the log from the start"


def test_a_reload_is_told_from_its_request_to_the_poll_that_ends_it(
    daemon: Daemon, root: Path, manager: Manager
) -> None:
    loaded, times = read(root=root, reserve_free=0, allow=REACH), iter([1.0, 2.0])
    reload, notices = Reload(loaded, daemon, now=lambda: next(times)), Notices(os.environ)
    assert _poll(reload, notices) == []
    assert (_poll(reload, notices), reload.loaded_at, manager.heard()) == (None, 1.0, [])
    _request(reload, notices)
    assert [each.partition("\n")[0] for each in manager.heard()] == ["RELOADING=1"]
    assert (_poll(reload, notices), reload.loaded_at, manager.heard()) == ([], 2.0, ["READY=1"])
    assert (_poll(reload, notices), manager.heard()) == (None, [])
