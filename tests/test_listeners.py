"""The sockets of the API and its certificate, opened and loaded in this process."""

from __future__ import annotations

import grp
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cachd.api.listeners import Sockets, _grant_access
from cachd.api.tls import Certificate, TlsFiles, expiry
from cachd.config import load
from cachd.daemon.listen import allowed_hosts, certified, tls_files
from cachd.errors import InUse, Invalid
from cachd.model.listener import Listener
from tests.ground.origin.certificates import Tls, certify
from tests.ground.site import until

PATIENCE_SECONDS = 60.0
DAY = 86400.0


def sockets(*listeners: str, **how: Any) -> Sockets:
    return Sockets(map(Listener.parse, listeners), **how)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# --- TCP ---


def test_the_sockets_come_in_the_order_of_their_listeners_and_close_at_the_exit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sockets("127.0.0.1:0", f"unix:{path}", "[::1]:0") as opening:
        first, second, third = opening.open_all()
        assert opening.open_all() == [first, second, third], "the same sockets again"
        host, port = first.sock.getsockname()
        assert first.place() == {"host": "127.0.0.1", "port": port}
        assert (host, port > 0) == ("127.0.0.1", True)
        assert second.place() == {"path": str(path)}
        assert third.place()["host"] == "::1"
        assert third.sock.family == socket.AF_INET6
        assert first.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for each in ((socket.AF_INET, (host, port)), (socket.AF_UNIX, str(path))):
            with socket.socket(each[0]) as client:
                client.connect(each[1])
    assert [each.sock.fileno() for each in (first, second, third)] == [-1, -1, -1]
    assert not path.exists()


def test_an_address_that_is_taken_is_left_out_or_refused(taken: int, tmp_path: Path) -> None:
    with sockets(f"127.0.0.1:{taken}", "127.0.0.1:0") as opening:
        (free,) = opening.open_free()
        assert free.place()["port"] != taken
        with pytest.raises(InUse) as refused:
            opening.open_all()
    assert refused.value.code == "cannot_listen"
    assert refused.value.detail.startswith(f"cannot listen on 127.0.0.1:{taken}: ")
    assert "stop the other daemon" in refused.value.hint


def test_an_address_that_becomes_free_in_time_is_opened() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port, asked = server.getsockname()[1], threading.Event()

    def clock() -> float:
        if asked.is_set():
            server.close()
        asked.set()
        return time.monotonic()

    with server, sockets(f"127.0.0.1:{port}", clock=clock) as opening:
        (opened,) = opening.open_all(patience_seconds=PATIENCE_SECONDS)
        assert opened.place()["port"] == port


def test_an_address_that_stays_in_use_is_tried_until_its_time_is_over(taken: int) -> None:
    for times in ([0.0, 5.0, 5.1], [0.0, 5.1]):
        asked = iter(times)
        with sockets(f"127.0.0.1:{taken}", clock=asked.__next__) as opening, pytest.raises(InUse):
            opening.open_all(patience_seconds=5.0)
        assert next(asked, None) is None, "at the deadline itself it is tried once more"


def test_what_cannot_be_listened_on_is_refused_with_its_reason(tmp_path: Path) -> None:
    for wrong in ("192.0.2.1:0", f"unix:{tmp_path}/absent/s", f"unix:{tmp_path}/s group=no-such-group"):
        with sockets(wrong) as opening, pytest.raises(Invalid) as refused:
            opening.open_free()
        assert refused.value.code == "cannot_listen"
        assert "choose another --listen" in refused.value.hint
    assert os.listdir(tmp_path) == []


# --- unix sockets ---


def test_a_socket_file_has_its_mode_and_group(tmp_path: Path) -> None:
    group = os.getgroups()[0] if os.getgroups() else os.getgid()
    plain, given = tmp_path / "plain", tmp_path / "given"
    with sockets(f"unix:{plain}", f"unix:{given} mode=0600 group={group}") as opening:
        opening.open_all()
        assert stat.S_IMODE(plain.stat().st_mode) == 0o660
        assert (stat.S_IMODE(given.stat().st_mode), given.stat().st_gid) == (0o600, group)
        assert plain.stat().st_gid in (os.getgid(), tmp_path.stat().st_gid)


def test_a_group_may_be_given_by_its_name(tmp_path: Path) -> None:
    mine = {os.getgid(), *os.getgroups()}
    group = next(
        g for g in grp.getgrall() if (g.gr_gid != os.getgid() if os.getuid() == 0 else g.gr_gid in mine)
    )
    with sockets(f"unix:{tmp_path}/s group={group.gr_name}") as opening:
        opening.open_all()
        assert (tmp_path / "s").stat().st_gid == group.gr_gid


def test_a_file_that_took_the_place_of_a_socket_is_not_opened_to_others(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("of another")
    path.chmod(0o600)
    with pytest.raises(FileExistsError):
        _grant_access(str(path), -1, 0o666)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_that_a_listener_opened_stays_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    (tmp_path / "file").touch()
    for place, opened in (("s", 1), ("file", 0), ("absent/s", 0)):
        before = descriptors()
        errors = list[Invalid]()  # an error keeps what its frames hold alive
        with sockets(f"unix:{tmp_path}/{place}") as opening:
            try:
                opening.open_all()
            except Invalid as error:
                errors.append(error)
            assert len(errors) == 1 - opened
            assert descriptors() == before + opened
        assert descriptors() == before


def test_a_stale_socket_file_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = path.stat().st_ino
    with sockets(f"unix:{path}") as first:
        first.open_all()
        with sockets(f"unix:{path}") as second, pytest.raises(InUse):
            second.open_all()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert path.exists(), before
    assert not path.exists()


def test_a_socket_whose_queue_is_full_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
        busy.bind(str(path))
        busy.listen(0)
        client.connect(str(path))
        with sockets(f"unix:{path}") as opening, pytest.raises(InUse):
            opening.open_all()
    assert path.exists()


def test_another_file_in_the_place_of_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with sockets(f"unix:{path}") as opening, pytest.raises(Invalid) as refused:
        opening.open_all()
    assert "another file is there" in refused.value.detail.lower() or "exists" in refused.value.detail.lower()
    assert path.read_text() == "precious"


def test_a_socket_file_of_somebody_else_is_not_removed_at_the_exit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sockets(f"unix:{path}") as opening:
        opening.open_all()
        path.rename(tmp_path / "kept")
        path.write_text("of another")
    assert path.read_text() == "of another"


def test_a_directory_in_which_another_daemon_is_just_starting_is_in_use(tmp_path: Path) -> None:
    import fcntl

    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with sockets(f"unix:{tmp_path}/s") as opening:
        with pytest.raises(InUse):
            opening.open_all()
        os.close(held)
        opening.open_all()


# --- what the options say ---


def test_the_names_of_the_daemon_are_those_of_the_option_and_of_its_addresses(tmp_path: Path) -> None:
    config = load(listen=["127.0.0.1:1", f"unix:{tmp_path}/s"], allowed_hosts=["cache.example"])
    assert allowed_hosts(config, config.listeners) == ["cache.example", "127.0.0.1"]


def test_the_files_of_tls_are_those_of_the_options(tmp_path: Path) -> None:
    pem, key, authority = tmp_path / "pem", tmp_path / "key", tmp_path / "authority"
    assert tls_files(load()) is None
    assert tls_files(load(tls_cert_file=pem)) == TlsFiles(pem, pem)
    complete = load(tls_cert_file=pem, tls_key_file=key, tls_client_ca_file=authority)
    assert tls_files(complete) == TlsFiles(pem, key, authority)
    assert TlsFiles(pem, key, authority).paths() == [pem, key, authority]
    assert TlsFiles(pem, key).paths() == [pem, key]


def test_a_certificate_is_watched_while_the_daemon_runs(tmp_path: Path) -> None:
    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    with certified(load()) as none:
        assert (none, "certificate" in names()) == (None, False)
    pem = certified_file(tmp_path / "pem")
    with certified(load(tls_cert_file=pem)) as certificate:
        assert certificate is not None
        assert "certificate" in names()
    assert "certificate" not in names()


# --- certificates ---


def certified_file(path: Path, days: float = 10) -> Path:
    certify(path, Tls(to_days=days))
    return path


def test_a_certificate_says_when_it_expires_and_a_wrong_pair_is_refused(tmp_path: Path) -> None:
    pem, other = certified_file(tmp_path / "pem", 10), certified_file(tmp_path / "other", 20)
    assert abs(expiry(TlsFiles(pem, pem)) - time.time() - 10 * DAY) < DAY
    with closing(Certificate(TlsFiles(other, other))) as certificate:
        assert abs(certificate.expires_at - time.time() - 20 * DAY) < DAY
        assert certificate.is_in_force
        assert certificate.context() is certificate.context()
        assert not certificate.context().get_ca_certs()
    with closing(Certificate(TlsFiles(pem, pem, client_ca=other))) as certificate:
        assert len(certificate.context().get_ca_certs()) == 1
    for wrong in (TlsFiles(pem, other), TlsFiles(pem, pem, tmp_path / "absent")):
        with pytest.raises(Invalid) as refused:
            expiry(wrong)
        assert refused.value.code == "bad_certificate"


def test_a_file_that_is_too_long_is_no_certificate(tmp_path: Path) -> None:
    pem = certified_file(tmp_path / "pem")
    content = pem.read_bytes()
    pem.write_bytes(content + b"\n" * ((1 << 20) - len(content)))
    assert expiry(TlsFiles(pem, pem))
    pem.write_bytes(content + b"\n" * ((1 << 20) - len(content) + 1))
    with pytest.raises(Invalid):
        expiry(TlsFiles(pem, pem))


def test_a_new_pair_is_taken_over_and_a_broken_one_is_not(tmp_path: Path) -> None:
    pem = certified_file(tmp_path / "pem", 10)
    with capture_logs() as logs, closing(Certificate(TlsFiles(pem, pem))) as certificate:
        certificate.start()
        first, began = certificate.context(), certificate.expires_at
        pem.write_text("no certificate")
        until(lambda: not certificate.is_in_force)
        assert (certificate.context(), certificate.expires_at) == (first, began)
        certified_file(pem, 30)
        until(lambda: certificate.is_in_force)
        assert certificate.context() is not first
        assert certificate.expires_at > began + 10 * DAY
        pem.unlink()
        until(lambda: not certificate.is_in_force)
    told = [each["event"] for each in logs]
    taken_over, not_taken_over = "certificate taken over", "certificate not taken over"
    assert [told[0], told[-1]] == [taken_over, not_taken_over]
    assert told.count(taken_over) == 2


def test_a_certificate_that_is_not_watched_can_be_closed(tmp_path: Path) -> None:
    pem = certified_file(tmp_path / "pem")
    Certificate(TlsFiles(pem, pem)).close()
