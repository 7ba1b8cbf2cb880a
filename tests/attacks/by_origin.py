"""What an origin tries that cachd is told to pull from."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tests.attacks.target import LIMIT_BYTES, MIB, Target, attack
from tests.ground.origin import Fault, File, Status, Unending
from tests.ground.scripted import Scripted, heard


@attack("foreign-text")
def terminal_commands_in_a_reason_phrase(target: Target) -> None:
    def script(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(b"HTTP/1.1 404 \x1b[2J\x1b]0;owned\x07 gone\r\nContent-Length: 0\r\n\r\n")

    with Scripted(script) as origin:
        target.pull(f"{origin.url}/x", "attack-text")
        answer = target.ended("attack-text")
    assert answer.status == 404
    for shown in (target.node.cli("ls").stdout, target.node.cli("show", "attack-text").stdout):
        assert "\x1b" not in shown
        assert "attack-text" in shown


@attack("special-address")
def redirects_and_refs_to_addresses_that_are_not_public(target: Target) -> None:
    for host in (
        "169.254.169.254",
        "192.0.0.192",
        "[3fff::1]",
        "[::ffff:10.0.0.1]",
        "0x7f000002",
        "100.64.0.1",
    ):
        answer = target.pull(f"https://{host}/x", "attack-address")
        final = target.ended("attack-address") if answer.status == 202 else answer
        assert final.status in (400, 403), (host, final)


@attack("costly-index")
def an_index_of_64_mib_of_nested_brackets(target: Target) -> None:
    size = target.many(640 * MIB) // 10
    files = {"model.safetensors.index.json": b"[" * size, "config.json": b"{}"}
    target.pull(target.origin.add_model("nested", files), "attack-nested")
    assert target.ended("attack-nested").status != 503


@dataclass(frozen=True)
class Claims(Fault):
    """The file has so many bytes, it says."""

    size: int

    def stored(self, file: File) -> File:
        return replace(file, content=Unending(file.content, self.size))


@attack("claimed-size")
def a_size_that_is_claimed_and_never_comes(target: Target) -> None:
    """What it must not cost is seen by what stands afterwards."""
    ref = target.origin.add("/claimed", b"x")
    target.origin.fault("/claimed", Claims(LIMIT_BYTES - 16 * MIB), methods=("HEAD",))
    target.origin.fault("/claimed", Status(404), methods=("GET",))
    target.pull(ref, "attack-claimed")
    assert target.ended("attack-claimed").status != 200


@attack("all-slots")
def directories_whose_files_are_slow_to_be_asked_for(target: Target) -> None:
    """Another pull ends meanwhile; so does each of theirs as soon as it is deleted."""
    with ExitStack() as stack:
        for number in range(8):
            slow = stack.enter_context(Scripted(never))
            target.pull(f"{slow.url}/slow-{number}/", f"attack-slow-{number}")
        target.pull(target.origin.add("/quick", b"quick"), "attack-quick")
        assert target.ended("attack-quick").status == 200
        for number in range(8):
            assert target.delete(f"attack-slow-{number}").status in (200, 204, 404)
        left = [model["name"] for model in target.ask("GET", "/v1/models").document["models"]]
        assert not [name for name in left if name.startswith("attack-slow")]


def never(connection: socket.socket, _: int) -> None:
    """Hear a request, and drip an answer that never ends."""
    if heard(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"x: y\r\n")
            if gone(connection, 0.5):
                return


def gone(connection: socket.socket, seconds: float) -> bool:
    """Whether the other end closes within this time."""
    return bool(select.select([connection], [], [], seconds)[0])


@attack("retry-after")
def an_answer_to_come_back_in_thirty_years(target: Target) -> None:
    for number in range(6):
        ref = target.origin.add(f"/later-{number}", b"x")
        target.origin.fault(
            f"/later-{number}", Status(503, {"Retry-After": "1000000000"}), methods=("GET", "HEAD")
        )
        target.pull(ref, f"attack-later-{number}")
    target.pull(target.origin.add("/quick", b"quick"), "attack-quick")
    assert target.ended("attack-quick").status == 200
