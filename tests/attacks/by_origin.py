"""What an origin tries that cachd is told to pull from."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cachd.preflight import remote
from cachd.store.layout import Layout
from tests.attacks.target import LIMIT_BYTES, MIB, TOKEN, Target, attack, outcome
from tests.attacks.test_crash_loop import die_while_it_pulls
from tests.attacks.test_documents import BEGUN, GROUP, filled
from tests.attacks.test_fuzz_parsers import JSON_PIECES
from tests.attacks.test_identity import COLLIDING, SMALL, alike_by_crc32
from tests.attacks.test_sources import assert_refused, blob_of
from tests.attacks.test_sources import digest as sha256_of
from tests.attacks.test_waits import KEPT, PROMPT_SECONDS
from tests.faults.test_fuzz import BUCKET_PAGE, HEAD_OF_OBJECT, LISTED, XML_PIECES
from tests.ground.bucket import Bucket
from tests.ground.models import noise
from tests.ground.origin import Fault, File, Late, Origin, Redirect, Reply, Seen, Status, Unending
from tests.ground.scripted import Scripted, heard
from tests.ground.site import said, until
from tests.ground.values import SHA256


def keys_file(target: Target) -> str:
    """A file of the keys that a scripted bucket believes."""
    path = target.share.parent / "keys"
    path.write_text("[default]\naws_access_key_id = AKIDSCRIPTED\naws_secret_access_key = x\n")
    return str(path)


@contextmanager
def knowing(target: Target, **endpoints: str) -> Iterator[None]:
    """The daemon asks these servers meanwhile: `s3` for the bucket `models`, `hf` for `nonsense/`."""
    before = target.node.options
    s3 = {"prefix": "s3://models/", "region": "us-east-1", "credentials": keys_file(target)}
    entries = {"s3": s3, "hf": {"prefix": "hf://nonsense/"}}
    sources = [{**entries[scheme], "endpoint": url} for scheme, url in endpoints.items()]

    def told() -> str:
        return str(target.ask("GET", "/v1/sources", token=TOKEN).document["sources"])

    target.node.configure(**before, sources=sources)
    try:
        until(lambda: all(url in told() for url in endpoints.values()))
        yield
    finally:
        target.node.configure(**before)
        until(lambda: not any(url in told() for url in endpoints.values()))


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


@attack("hostile-page")
def a_script_in_a_reason_phrase(target: Target) -> None:
    script = "<img src=x onerror=alert(1)>"

    def answers(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(f"HTTP/1.1 404 {script}\r\nContent-Length: 0\r\n\r\n".encode())

    with Scripted(answers) as origin:
        target.pull(f"{origin.url}/x", "attack-page")
        target.ended("attack-page")
    answer = target.ask("GET", "/v1/models/attack-page")
    assert script in answer.document["pull"]["error"]["detail"]
    assert said(answer, "Content-Type") == "application/json"
    policy = said(target.ask("GET", "/"), "Content-Security-Policy").split("; ")
    assert {"script-src 'self'", "require-trusted-types-for 'script'", "trusted-types 'none'"} <= {*policy}


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
        final = target.outcome(f"https://{host}/x", "attack-address")
        assert final.status in (400, 403), (host, final)


@attack("costly-index")
def an_index_of_64_mib_of_nested_brackets(target: Target) -> None:
    size = target.many(640 * MIB) // 10
    files = {"model.safetensors.index.json": b"[" * size, "config.json": b"{}"}
    target.pull(target.origin.add_model("nested", files), "attack-nested")
    assert target.ended("attack-nested").status != 503


@attack("costly-headers")
def headers_of_weights_that_take_long_to_read(target: Target) -> None:
    """The preflight of each pull reads them; so does the preflight of a ref, from the source."""
    size = target.many(64 * MIB)
    tensor = b'"%d": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},'
    text = b"{" + b"".join(tensor % n for n in range(size // len(tensor)))
    files = {
        "nested.safetensors": size.to_bytes(8, "little") + b"[" * size,
        "many.safetensors": len(text).to_bytes(8, "little") + text,
        "items.gguf": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(size // 10),
        "model.onnx": b"graph",
        "x" * 200 + ".onnx_data": b"data",
    }
    ref = target.origin.add_model("headers", files)
    answer = target.ask("POST", "/v1/preflight", {"ref": ref, "seconds": 20}, token=TOKEN)
    assert answer.status == 200
    if size < remote.MAX_BYTES:
        assert answer.document["level"] == "refused"
    else:  # the first header takes all that a preflight of a ref may receive
        assert "not_examined" in {each["code"] for each in answer.document["findings"]}
    target.pull(ref, "attack-headers")
    assert target.ended("attack-headers").status != 503


@attack("slow-headers")
def an_origin_that_never_ends_the_header_of_a_preflight(target: Target) -> None:
    ref = target.origin.add_model(
        "dripping", {"model.safetensors": bytes([200] * 2 + [0] * 6) + b" " * 51400}
    )
    target.origin.fault("/dripping/model.safetensors", Late(), methods=("GET",))
    answer = target.ask("POST", "/v1/preflight", {"ref": ref, "seconds": 2}, token=TOKEN)
    assert "not_examined" in [each["code"] for each in answer.document["findings"]]


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


def weak(kind: str, content: bytes) -> dict[str, str]:
    """The header of S3 that states a file's weak digest."""
    crc32 = zlib.crc32(content).to_bytes(4, "big")
    digest = hashlib.sha1(content).digest() if kind == "sha1" else crc32
    return {f"x_amz_checksum_{kind}": base64.b64encode(digest).decode()}


@attack("colliding-digest")
def other_bytes_with_the_weak_digest_of_anothers_file(target: Target) -> None:
    real = noise(MIB)
    with Bucket() as bucket, knowing(target, s3=bucket.url):
        for kind, contents in {"sha1": COLLIDING, "crc32": (real, alike_by_crc32(real))}.items():
            for number, content in enumerate(contents):
                name = f"attack-{kind}-{number}"
                bucket.put(f"{name}/x", content, **weak(kind, content))
                target.pull(f"s3://models/{name}/", name)
                assert outcome(target, name) == "ready"
                assert (target.node.root / "models" / name / "x").read_bytes() == content
    target.hub.add("attack/secret", {"config.json": SMALL})
    target.pull("hf://attack/secret", "attack-secret")
    assert outcome(target, "attack-secret") == "ready"
    target.hub.add("attack/copy", {"config.json": bytes(len(SMALL))})
    target.hub.misstate("attack/copy", "config.json", of="attack/secret")
    target.pull("hf://attack/copy", "attack-copy")
    assert outcome(target, "attack-copy") not in ("ready", "waiting")


def as_xml(body: str) -> Status:
    return Status(200, {"Content-Type": "application/xml"}, body.encode())


@attack("costly-listing")
def documents_that_are_dear_to_parse(target: Target) -> None:
    """What they must not cost is seen by the daemon's peak."""
    for begun, more in ((BEGUN, b"["), (BEGUN + b"[", GROUP)):
        listing = begun + more * (20 * MIB // len(more))
        target.hub.fault("*", Status(200, {"Content-Type": "application/json"}, listing))
        target.pull("hf://attack/costly", "attack-costly")
        assert outcome(target, "attack-costly").startswith("document_too_")
        target.hub.clear()
    target.origin.add("/costly/SHA256SUMS", b"\n" * (16 * MIB))
    target.pull(f"{target.origin.url}/costly/", "attack-sums")
    assert outcome(target, "attack-sums") == "document_too_large"
    tags = ("<a/>" * MIB, "<a>" * 200_000, "x" * 5 * MIB, " ".join(f'<a{n} b=""/>' for n in range(100_000)))
    with Bucket() as bucket, knowing(target, s3=bucket.url):
        for costly in tags:
            bucket.fault("*", as_xml(f"<ListBucketResult>{costly}"))
            target.pull("s3://models/costly/", "attack-tags")
            assert outcome(target, "attack-tags") == "document_too_large"
            bucket.clear()


@dataclass
class Pages(Fault):
    """Pages of a listing without end, each with one file; in what they say, {n} is the number of the page."""

    key: str = "elsewhere/{n}"
    etag: str = "one"
    mark: str = "{n}"
    said: int = 0

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        self.said += 1
        entry = f"<Key>{self.key}</Key><ETag>{self.etag}</ETag><Size>1</Size>"
        then = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{self.mark}</NextContinuationToken>"
        page = f"<ListBucketResult>{then}<Contents>{entry}</Contents></ListBucketResult>"
        return as_xml(page.replace("{n}", str(self.said))).reply(seen, reply)


@attack("endless-listing")
def pages_without_end(target: Target) -> None:
    long = "e" * (3 * MIB)
    tried = {
        "document_too_large": Pages(),
        "waiting": Pages(mark="the same"),
        "too_many_files": Pages(key="m/{n}", etag=long),
    }
    with Bucket() as bucket, knowing(target, s3=bucket.url):
        for code, pages in tried.items():
            bucket.fault("*", pages)
            target.pull("s3://models/m/", "attack-pages")
            assert outcome(target, "attack-pages") == code
            target.delete("attack-pages")
            bucket.clear()
            assert pages.said <= 1001, code


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {  # how an answer begins, and what comes without end
    "1xx": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "a head": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 5000),
    "a chunk's extension": (CHUNKED + b"2;", b"x" * 30_000),
    "a body": (CHUNKED, b"10000\r\n" + bytes(1 << 16) + b"\r\n"),
    "chunks": (CHUNKED, b"2\r\nok\r\n" * 5000),
    "trailers": (CHUNKED + b"2\r\nok\r\n0\r\n", b"X: y\r\n" * 5000),
}


def unending(kind: str, taken: list[int]) -> Callable[[socket.socket, int], None]:
    """A script whose answer does not end; `taken` gets the bytes that each connection took of it."""
    begun, more = ENDLESS[kind]

    def script(connection: socket.socket, _: int) -> None:
        heard(connection)
        taken.append(0)
        connection.sendall(begun)
        while taken[-1] < 640 * MIB:
            connection.sendall(more)
            taken[-1] += len(more)

    return script


@attack("endless-answer")
def answers_without_end(target: Target) -> None:
    for kind in ENDLESS:
        taken: list[int] = []
        with Scripted(unending(kind, taken)) as origin:
            target.pull(f"{origin.url}/x/", "attack-endless")
            assert outcome(target, "attack-endless") != "ready"
            target.delete("attack-endless")
        assert 0 < max(taken) < 64 * MIB, (kind, taken)


@attack("endless-wait")
def origins_that_keep_a_pull_waiting(target: Target) -> None:
    """A delete ends it where the daemon reaches them, a stop of another daemon wherever they are."""
    plain: dict[str, Any] = {"allow": ["127.0.0.0/8", "10.0.0.0/8"], "connect_seconds": 600}
    plain["sources"] = [{"prefix": "s3://models/", "region": "us-east-1", "credentials": keys_file(target)}]
    for number, keeping in enumerate(KEPT.values()):
        with keeping() as kept:
            if not kept.options:
                assert target.pull(kept.ref, "it").status == 202
                with suddenly(partial(kept.arrived, target.node)):
                    assert target.delete("it").status == 200
            elif not target.short or number % 2:
                with target.another(f"kept-{number}", **{**plain, **kept.options}) as node:
                    node.pull(kept.ref, name="it")
                    with suddenly(partial(kept.arrived, node)):
                        assert node.stop() == 0


@contextmanager
def suddenly(arrived: Callable[[], bool]) -> Iterator[None]:
    """What is done inside is soon done, once this is so."""
    until(arrived)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PROMPT_SECONDS


PIECES = (*JSON_PIECES, *XML_PIECES, b"", b"\r\n", b"  ", b"../", b": ", b"-1", b"9" * 30, b"\x1b[2J")
SAID = {  # what is asked for, the good answer, and the good body
    b"GET /api/models/": (b"application/json", json.dumps(LISTED).encode()),
    b"GET /models?": (b"application/xml", BUCKET_PAGE.replace(b"m/", b"m0/")),
    b"SHA256SUMS": (b"text/plain", f"{SHA256}  a/b\n{SHA256} *c\n".encode()),
    b"": (b"x\r\n" + "\r\n".join(": ".join(pair) for pair in HEAD_OF_OBJECT.items()).encode(), b"x" * 12),
}
SUMS = "{url}/d-{n}/"
ASKED = ("{url}/x-{n}", SUMS, SUMS, SUMS, SUMS, "hf://nonsense/m", "hf://nonsense/m", "s3://models/m0/")


def spoiled(content: bytes, chance: random.Random) -> bytes:
    """The content after a few stretches of it were cut out, doubled, or replaced."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randint(0, len(content))
        stop = start + chance.randrange(40)
        put = chance.choice([content[start:stop] * 2, chance.randbytes(9), chance.choice(PIECES)])
        content = content[:start] + put + content[stop:]
    return content


def nonsense(connection: socket.socket, number: int) -> None:
    """Answer one request: its head or its body is spoiled, in a way of this number alone."""
    chance, asked = random.Random(number), connection.recv(65536)
    kind, body = next(said for word, said in SAID.items() if word in asked.partition(b"\r\n")[0])
    head_alone = asked.startswith(b"HEAD")
    body = body if chance.random() < 0.3 or not body else spoiled(body, chance)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b" % kind
    head += b"" if b"Content-Length" in head else b"\r\nContent-Length: %d" % len(body)
    head = spoiled(head, chance) if chance.random() < (0.7 if head_alone else 0.3) else head
    connection.sendall(head + b"\r\n\r\n" + b"" * head_alone + body * (not head_alone))


@attack("nonsense")
def mutated_heads_bodies_and_documents(target: Target) -> None:
    ended: set[str] = set()
    with Scripted(nonsense) as origin, knowing(target, s3=origin.url, hf=origin.url):
        for first in range(0, target.many(400), 20):
            names = [f"attack-nonsense-{number}" for number in range(first, first + 20)]
            for number, name in enumerate(names):
                ref = ASKED[number % len(ASKED)].format(url=origin.url, n=first + number)
                assert target.pull(ref, name).status == 202
            for name in names:
                ended.add(outcome(target, name))
                target.delete(name)
    assert "internal" not in ended, target.node.output.partition("Traceback")[2][:4000]
    assert len(ended) > 3, ended
    assert "in a way it should not" not in target.node.output


@attack("slow-resolve")
def a_directory_that_is_listed_so_slowly_that_it_never_ends(target: Target) -> None:
    with Origin() as origin, target.another("slow", resolve_seconds=3, pulls=1) as node:
        ref = origin.add_model("it", {f"{number}.bin": b"x%d" % number for number in range(1000)})
        origin.fault("*", Late(0.5), methods=("HEAD",))
        node.pull(ref, name="it")
        node.pull(target.origin.add("/quick", b"quick"), name="quick")
        answer = node.ready("it")
        assert (answer.status, answer.document["code"]) == (503, "resolve_too_slow")
        asked = len(origin.requests)
        assert node.ready("quick").status == 200
        assert len(origin.requests) - asked < 16


@attack("crash-loop")
def an_answer_with_which_the_daemon_dies(target: Target) -> None:
    with Origin() as origin, target.another("dies", retries=0) as node:
        hold = origin.hold("/m/f", after=0)
        ref = origin.add_model("m", {"f": noise(MIB)})
        node.pull(ref, name="m")
        die_while_it_pulls(node, 3)
        origin.forget()
        node.start()
        shown = node.ask("GET", "/v1/models/m").document
        assert shown["state"] == "failed"
        assert shown["pull"]["error"]["code"] == "crash_loop"
        assert not origin.requests
        hold.release()
        assert node.pull(ref, name="m").status == 202
        assert node.ready("m").status == 200


@attack("led-away")
def redirects_to_a_refused_host_and_to_one_that_collects_credentials(target: Target) -> None:
    headers = target.share.parent / "headers"
    headers.write_text("Authorization: Bearer canary\n")
    with Origin() as origin, Origin() as refused, Origin() as collects:
        entries: list[dict[str, Any]] = [
            {"prefix": f"{origin.url}/ok/", "allow": True, "headers_file": str(headers)},
            {"prefix": f"{refused.url}/", "refuse": True},
        ]
        with target.another("led", sources=entries) as node:
            for name, to in {"refused": refused, "collects": collects}.items():
                origin.add(f"/ok/{name}", b"x")
                moved = Redirect(to.add("/x", b"x"))
                origin.fault(f"/ok/{name}", moved, methods=("GET", "HEAD"))
                node.pull(f"{origin.url}/ok/{name}", name=name)
            answer = node.ready("refused")
            assert (answer.status, answer.document["code"]) == (403, "source_refused")
            assert not refused.requests
            assert node.ready("collects").status == 200
        assert all("canary" in seen.headers["authorization"] for seen in origin.requests)
        assert collects.requests
        assert not [seen for seen in collects.requests if "authorization" in seen.headers]


@attack("refused-digest")
def a_refused_file_under_other_names_and_without_a_digest(target: Target) -> None:
    content = noise(2 * MIB, seed=4)
    with target.another("refusing") as node:
        for name in ("one", "two"):
            node.pull(target.origin.add_model(f"{name}-refused", {"x": content}), name=name, pin=True)
            assert node.ready(name).status == 200
        blob = blob_of(node.root, content)
        assert blob.exists()
        node.configure(**node.options, refuse=[sha256_of(content)])
        for name in ("one", "two"):
            assert_refused(node, name)
        until(lambda: not blob.exists())
        for name, ref in {
            "told": target.origin.add_model("other", {"x": content}),
            "not-told": target.origin.add("/not-told", content),
        }.items():
            node.pull(ref, name=name)
            answer = node.ready(name)
            assert (answer.status, answer.document["code"]) == (403, "refused_digest")
            assert not (node.root / "models" / name).exists()


@attack("filled-files")
def files_of_a_tebibyte_in_the_cache_and_an_api_that_never_ends(target: Target) -> None:
    with target.another("filled") as node:
        node.pull(target.origin.add("/kept", b"kept"), name="kept")
        assert node.ready("kept").status == 200
        node.stop()
        layout = Layout(node.root)
        for path in (
            layout.usage_log,
            layout.pending_file("w"),
            layout.lease("l"),
            layout.manifest("f" * 32),
        ):
            filled(path)
        for path in (layout.ready_file("m"), layout.previous_file("m"), node.root / "status/m.json"):
            filled(path)
        node.start()
        assert node.ready("kept").status == 200
        filled(layout.ready_file("m"))
        waited = node.cli("wait", "m", "--cache", str(node.root), "--timeout", "1")
        assert waited.returncode
        assert "Traceback" not in waited.stderr
    taken: list[int] = []
    with Scripted(unending("a body", taken)) as server:
        listed = target.node.cli("ls", CACHD_SERVER=server.url)
    assert listed.returncode
    assert "Traceback" not in listed.stderr
    assert 0 < max(taken) < 512 * MIB, taken
