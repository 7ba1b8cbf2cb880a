"""What belongs to a prefix stays there: permission, credentials; and what is refused goes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import CachdError, Forbidden
from tests.conftest import Engine, spec_of
from tests.ground.bucket import Bucket, Metadata, Sts
from tests.ground.checksums import sha256sums
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Redirect, Status
from tests.ground.site import Ground, until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120
CANARY = "canary-7f3a9c"
METHODS = ("GET", "HEAD")
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


def refused(call: Callable[[], object]) -> str:
    """The code that a call is refused with."""
    with pytest.raises(CachdError) as refusal:
        call()
    assert CANARY not in str(refusal.value)
    return refusal.value.code


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the environment keys that a scripted bucket believes."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSCRIPTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")


@pytest.fixture
def other() -> Iterator[Origin]:
    with Origin() as started:
        yield started


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    file = tmp_path / "headers"
    file.write_text(f"# for the origin alone\nAuthorization: Bearer {CANARY}\nX-Team: ml\n")
    return file


def authorized(origin: Origin) -> list[str]:
    """The paths that were asked for with the canary."""
    return [seen.path for seen in origin.requests if CANARY in str(seen.headers)]


# --- what may be pulled ---


def test_only_the_organisations_that_an_entry_lists_may_be_pulled(engine: Engines, hub: Hub) -> None:
    for repo in ("good/model", "good/secret", "goodother/model", "evil/model"):
        hub.add(repo, {"config.json": b"{}"})
    entries = [
        {"prefix": "hf://", "allow": ["good/"]},
        {"prefix": "hf://good/secret", "refuse": True},
    ]
    running = engine(hf_endpoint=hub.url, sources=entries)
    running.pull("hf://good/model")
    asked = len(hub.requests)
    for ref in (
        "hf://goodother/model",
        "hf://evil/model",
        "hf://EVIL/model",
        "hf://good/secret",
        "hf://Good/Secret",
    ):
        assert refused(lambda ref=ref: running.pull(ref)) == "source_refused"
    assert len(hub.requests) == asked, "nobody was asked"


def test_a_refused_path_is_refused_however_it_is_written(engine: Engines, origin: Origin) -> None:
    origin.add("/open/x", b"x")
    origin.add("/secret/x", b"x")
    host = origin.url.removeprefix("http://")
    entries = [
        {"prefix": f"{origin.url}/", "allow": True},
        {"prefix": f"{origin.url}/secret/", "refuse": True},
    ]
    running = engine(sources=entries, allow=())
    running.pull(f"{origin.url}/open/x")
    asked = len(origin.requests)
    for path in (
        "secret/x",
        "%73ecret/x",
        "/secret/x",
        "open%2F..%2Fsecret/x",
        "secret;a/x",
        "secret%2Fx",
        "%2573ecret/x",
    ):
        code = refused(lambda path=path: running.pull(f"http://{host}/{path}", name="secret"))
        assert code in ("source_refused", "ambiguous_path", "bad_ref"), path
    assert len(origin.requests) == asked, "nobody was asked"


def test_an_allowed_origin_leads_to_no_host_that_an_entry_refuses(
    engine: Engines, origin: Origin, other: Origin
) -> None:
    origin.add("/ok/x", b"x")
    other.add("/x", b"x")
    origin.fault("/ok/x", Redirect(other.url + "/x"), methods=METHODS)
    entries = [{"prefix": f"{origin.url}/ok/", "allow": True}, {"prefix": f"{other.url}/", "refuse": True}]
    assert refused(lambda: engine(sources=entries).pull(f"{origin.url}/ok/x")) == "source_refused"
    assert not other.requests


def test_an_allowed_origin_may_lead_to_its_own_cdn_though_no_other_source_is_allowed(
    engine: Engines, hub: Hub, root: Path
) -> None:
    hub.add("org/model", {"model.safetensors": noise(2 * MIB)})
    entries: list[dict[str, Any]] = [
        {"prefix": "http://", "refuse": True},
        {"prefix": "https://", "refuse": True},
    ]
    engine(hf_endpoint=hub.url, sources=entries).pull("hf://org/model")
    assert hub.cdn.bytes_sent() == 2 * MIB


def test_a_pull_of_more_than_what_is_refused_takes_no_file_of_it(
    engine: Engines, origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys(monkeypatch)
    ref = origin.add_model("web", {"a.bin": b"a", "private/b.bin": b"b"})
    shared = tmp_path / "share"
    (shared / "private").mkdir(parents=True)
    (shared / "private/b.bin").write_bytes(b"b")
    (shared / "a.bin").write_bytes(b"a")
    with Bucket() as bucket:
        bucket.put("m/a.bin", b"a")
        bucket.put("m/private/b.bin", b"b")
        tops = (ref, f"file://{shared}/", "s3://models/m/")
        entries = [{"prefix": f"{top}private/", "refuse": True} for top in tops]
        running = engine(
            sources=entries, s3_endpoint_url=bucket.url, allow=("127.0.0.0/8", f"file://{shared}/")
        )
        assert refused(lambda: running.pull(ref)) == "source_refused"
        assert refused(lambda: running.pull(f"file://{shared}/")) == "file_refused"
        (shared / "link").symlink_to(shared / "private/b.bin")
        assert refused(lambda: running.pull(f"file://{shared}/link")) == "path_refused"
        assert refused(lambda: running.pull("s3://models/m/")) == "file_refused"
        running.pull("s3://models/m/", exclude=("private/",))
    assert not [
        seen for seen in (*origin.requests, *bucket.requests) if "/private/" in seen.path and seen.sent
    ]


def test_patterns_of_an_entry_hold_below_its_prefix_alone(engine: Engines, hub: Hub) -> None:
    for repo in ("org/a", "org/b", "other/c"):
        hub.add(repo, {"model.bin": b"pickle", "config.json": b"{}"})
    entries = [
        {"prefix": "hf://org/", "refuse": ["*.bin"]},
        {"prefix": "hf://org/b", "refuse": False},
        {"prefix": "hf://other/", "allow": ["*.json"]},
    ]
    running = engine(hf_endpoint=hub.url, sources=entries)
    assert refused(lambda: running.pull("hf://org/a")) == "file_refused"
    running.pull("hf://org/b")
    assert refused(lambda: running.pull("hf://other/c")) == "file_refused"
    running.pull("hf://other/c", include=("*.json",))


def test_patterns_of_a_part_hold_for_a_pull_of_more_than_that(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys(monkeypatch)
    with Bucket() as bucket:
        for key in ("m/a.pt", "m/tenant/b.pt", "m/tenant/c.json", "m/only/d.json", "m/only/e.txt"):
            bucket.put(key, b"x")
        entries = [
            {"prefix": "s3://models/m/tenant/", "refuse": ["*.pt"]},
            {"prefix": "s3://models/m/only/", "allow": ["*.json"]},
        ]
        running = engine(sources=entries, s3_endpoint_url=bucket.url)
        with pytest.raises(Forbidden, match=r"2 files that this node refuses: only/e\.txt, tenant/b\.pt"):
            running.pull("s3://models/m/")
        running.pull("s3://models/m/", exclude=("only/e.txt", "tenant/b.pt"))


def test_an_entry_of_a_scheme_alone_opens_no_private_address(engine: Engines, origin: Origin) -> None:
    url = origin.add("/x", b"x")
    running = engine(sources=[{"prefix": "http://", "allow": True}], allow=())
    assert refused(lambda: running.pull(url)) == "plaintext_refused"


# --- credentials stay with their prefix ---


def test_headers_of_a_prefix_reach_no_other_prefix_and_no_other_host(
    engine: Engines, origin: Origin, other: Origin, headers: Path
) -> None:
    """Promised: A header, query or key of one prefix is sent for no other prefix, and to no other host."""
    for path in ("/private/x", "/privateother/x", "/public/x", "/private/moved"):
        origin.add(path, b"x" * KIB)
    other.add("/away", b"x" * KIB)
    origin.fault("/private/moved", Redirect(other.url + "/away"), methods=METHODS)
    entries = [{"prefix": f"{origin.url}/private/", "headers_file": str(headers)}]
    running = engine(sources=entries)
    for number, path in enumerate(("/private/x", "/privateother/x", "/public/x", "/private/moved")):
        running.pull(origin.url + path, name=f"x{number}")
    running.pull(other.url + "/away", name="away")
    assert set(authorized(origin)) == {"/private/x", "/private/moved"}
    assert other.requests
    assert not authorized(other)
    assert not [seen for seen in other.requests if "x-team" in seen.headers]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Host: {CANARY}", "bad_secret"),
        (f"Range: bytes=0-{CANARY}", "bad_secret"),
        (f"Transfer-Encoding: {CANARY}", "bad_secret"),
        (f"no header {CANARY}", "bad_secret"),
        (f"A: b\r\n\r\n{CANARY}\x00: c", "bad_secret"),
        (f"X: {CANARY}\n" * 2000, "bad_secret"),
        ("\n".join(f"X-{n}: {CANARY}" for n in range(21)), "bad_secret"),
    ],
)
def test_a_file_of_headers_that_cannot_be_sent_is_refused_and_not_repeated(
    engine: Engines, origin: Origin, headers: Path, text: str, code: str
) -> None:
    headers.write_text(text)
    url = origin.add("/x", b"x")
    running = engine(sources=[{"prefix": f"{origin.url}/", "headers_file": str(headers)}])
    assert refused(lambda: running.pull(url)) == code
    assert not origin.requests


def test_headers_are_read_again_as_they_rotate(engine: Engines, origin: Origin, headers: Path) -> None:
    url = origin.add("/x", b"x")
    running = engine(sources=[{"prefix": f"{origin.url}/", "headers_file": str(headers)}])
    running.pull(url, name="before")
    headers.write_text("Authorization: Bearer next\n")
    origin.forget()
    running.pull(url, name="after", exclude=("nothing",))
    assert {seen.headers.get("authorization") for seen in origin.requests} == {"Bearer next"}


SIGNED = f"Policy=eyJ~_-&Signature={CANARY}%2Bx&Key-Pair-Id=K2"


def test_the_query_of_a_prefix_reaches_no_other_prefix_and_no_other_host(
    engine: Engines, origin: Origin, other: Origin, tmp_path: Path
) -> None:
    """Promised: A header, query or key of one prefix is sent for no other prefix, and to no other host."""
    (tmp_path / "query").write_text(f"?{SIGNED}\n")
    files = {"config.json": b"{}", "model.bin": noise(300 * KIB), "moved": b"x" * KIB}
    for path, content in {**files, "SHA256SUMS": sha256sums(files)}.items():
        origin.add(f"/m/{path}", content)
    origin.add("/mother/x", b"x")
    other.add("/away", files["moved"])
    # An origin that repeats the query in a redirect to another, as those do that redirect complete sites.
    away = f"{other.url}/away?{SIGNED.replace('~', '%7E')}&kept=1"
    origin.fault("/m/moved", Redirect(away), methods=METHODS)
    running = engine(sources=[{"prefix": f"{origin.url}/m/", "query_file": str(tmp_path / "query")}])
    running.pull(f"{origin.url}/m/", name="m")
    assert {p.name: p.read_bytes() for p in running.store.layout.model("m").iterdir()} == files
    running.pull(f"{origin.url}/mother/x", name="x")
    running.pull(f"{other.url}/away", name="away")
    asked = {(seen.path, seen.query) for seen in origin.requests}
    assert asked == {(f"/m/{path}", SIGNED) for path in (*files, "SHA256SUMS")} | {("/mother/x", "")}
    assert {seen.query for seen in other.requests} == {"kept=1", ""}


def test_a_redirect_on_the_same_host_gets_the_query_of_its_location_alone(
    engine: Engines, origin: Origin, tmp_path: Path
) -> None:
    (tmp_path / "query").write_text(SIGNED)
    origin.add("/m/x", b"x" * KIB)
    origin.add("/elsewhere", b"x" * KIB)
    origin.fault("/m/x", Redirect("/elsewhere?own=1"), methods=METHODS)
    engine(sources=[{"prefix": f"{origin.url}/m/", "query_file": str(tmp_path / "query")}]).pull(
        f"{origin.url}/m/x"
    )
    assert {s.query for s in origin.requests if s.path == "/elsewhere"} == {"own=1"}


@pytest.mark.parametrize(
    "text", [f"a={CANARY}\nb=2", f"a={CANARY}#x", f"a={CANARY} b", f"a={CANARY}\u00e9", f"{CANARY}" * 9000]
)
def test_a_query_that_cannot_be_sent_is_refused_and_not_repeated(
    engine: Engines, origin: Origin, tmp_path: Path, text: str
) -> None:
    (tmp_path / "query").write_text(text)
    url = origin.add("/x", b"x")
    running = engine(sources=[{"prefix": f"{origin.url}/", "query_file": str(tmp_path / "query")}])
    assert refused(lambda: running.pull(url)) == "bad_secret"
    assert not origin.requests


def test_a_query_is_read_again_as_it_rotates_and_the_model_stays_the_same(
    engine: Engines, origin: Origin, tmp_path: Path
) -> None:
    query = tmp_path / "query"
    query.write_text("sig=one")
    url = origin.add("/x", b"x" * KIB)
    running = engine(sources=[{"prefix": f"{origin.url}/", "query_file": str(query)}])
    before = running.pull(url, name="before")
    query.write_text("sig=two")
    origin.forget()
    assert running.pull(url, name="after", exclude=("nothing",)).manifest == before.manifest
    assert {seen.query for seen in origin.requests} == {"sig=two"}


def test_no_query_of_an_entry_is_shown_by_the_api_the_log_the_disk_or_an_error(
    node: Nodes, origin: Origin, tmp_path: Path
) -> None:
    (tmp_path / "query").write_text(SIGNED)
    origin.add("/ok", b"x" * KIB)
    codes = {403: "source_forbidden", 404: "file_not_found", 500: "origin_failed"}
    for status in codes:
        origin.fault(f"/{status}", Status(status), methods=METHODS)
    running = node(sources=[{"prefix": f"{origin.url}/", "query_file": str(tmp_path / "query")}], retries=0)
    for path in ("ok", *codes):
        running.pull(f"{origin.url}/{path}", name=f"m{path}")
        running.ready(f"m{path}", wait=0 if path == 500 else 60)
    assert {seen.query for seen in origin.requests} == {SIGNED}
    paths = ("/v1/options", "/v1/sources", "/v1/models", "/metrics", f"/v1/sources?ref={origin.url}/ok")
    shown = [running.ask("GET", path).document for path in paths]
    shown += [running.ask("GET", f"/v1/models/m{path}").document for path in ("ok", *codes)]
    shown += [running.cli("sources", f"{origin.url}/ok").stdout, running.cli("show", "m403").stdout]
    running.stop()
    shown += [p.read_text(errors="replace") for p in running.root.rglob("*") if p.is_file()]
    shown += [running.output]
    assert CANARY not in str(shown)
    assert "Key-Pair-Id" not in str(shown)
    assert str(tmp_path / "query") in str(shown)


def test_the_token_of_the_options_goes_to_no_endpoint_of_an_entry(
    engine: Engines, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(hub.token)
    with Hub() as mirror:
        mirror.add("org/model", {"config.json": b"{}"})
        hub.add("own/model", {"config.json": b"{}"}, private=True)
        entries = [{"prefix": "hf://org/", "endpoint": mirror.url}]
        running = engine(hf_endpoint=hub.url, hf_token_file=tmp_path / "token", sources=entries)
        running.pull("hf://org/model")
        running.pull("hf://own/model")
        assert mirror.requests
        assert not [seen for seen in mirror.requests if "authorization" in seen.headers]


def test_the_credentials_of_a_prefix_go_to_no_endpoint_that_a_longer_one_names(
    engine: Engines, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(hub.token)
    with Hub() as mirror:
        mirror.add("org/model", {"config.json": b"{}"})
        entries = [
            {"prefix": "hf://", "endpoint": hub.url, "credentials": str(tmp_path / "token")},
            {"prefix": "hf://org/", "endpoint": mirror.url},
        ]
        engine(sources=entries).pull("hf://org/model")
        assert not [seen for seen in mirror.requests if "authorization" in seen.headers]


def test_keys_of_a_bucket_sign_nothing_for_another_endpoint(
    engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promised: A header, query or key of one prefix is sent for no other prefix, and to no other host."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    file = tmp_path / "keys"
    file.write_text(f"[default]\naws_access_key_id = AKIDSCRIPTED\naws_secret_access_key = {CANARY}\n")
    with Bucket("models") as bucket, Bucket("foreign") as foreign:
        bucket.put("m/it", noise(KIB))
        foreign.put("m/it", noise(KIB))
        entries = [
            {"prefix": "s3://models/", "endpoint": bucket.url, "credentials": str(file)},
            {"prefix": "s3://foreign/", "endpoint": foreign.url},
        ]
        running = engine(sources=entries)
        running.pull("s3://models/m/")
        assert refused(lambda: running.pull("s3://foreign/m/", name="foreign")) == "source_forbidden"
        told = [f"{seen.query} {seen.headers}" for seen in foreign.requests]
        assert told
        assert not [each for each in told if "AKID" in each]
        assert not [seen for seen in bucket.requests if "AKIDENVIRONMENT" in f"{seen.query} {seen.headers}"]


def test_no_secret_of_an_entry_is_shown_by_the_api_the_log_or_an_error(
    node: Nodes, origin: Origin, headers: Path, tmp_path: Path
) -> None:
    url = origin.add("/x", b"x")
    file = tmp_path / "keys"
    file.write_text(f"[default\naws_secret_access_key = {CANARY}\n")  # which no parser takes
    with Bucket() as bucket:
        entries = [
            {"prefix": f"{origin.url}/", "headers_file": str(headers)},
            {"prefix": "s3://models/", "endpoint": bucket.url, "credentials": str(file)},
        ]
        running = node(sources=entries, retries=0)
        running.pull(url)
        assert running.ready("x").status == 200
        running.pull("s3://models/m/")
        assert running.ready("m").status == 403
    assert authorized(origin)
    shown = [running.ask("GET", path).document for path in ("/v1/options", "/v1/sources", "/v1/models")]
    shown += [running.ask("GET", f"/v1/sources?ref={url}").document, running.output]
    shown += [running.cli("sources", url).stdout, running.cli("options", "--effective").stdout]
    assert CANARY not in str(shown)
    assert str(headers) in str(shown)


# --- the keys of the machine ---


@pytest.mark.parametrize("way", ["default chain", "credential_source of a profile"])
def test_the_metadata_service_of_a_machine_is_asked_by_no_pull_that_an_entry_does_not_let(
    node: Nodes, tmp_path: Path, way: str
) -> None:
    """Promised: The metadata service of the machine is asked only where the configuration says so."""
    with Bucket() as bucket, Metadata() as metadata:
        bucket.put("m/it", noise(KIB))
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "HOME": str(tmp_path)}
        entry: dict[str, Any] = {"prefix": "s3://models/"}
        if way != "default chain":
            (tmp_path / "config").write_text(
                "[profile it]\nrole_arn = arn:aws:iam::123456789012:role/x\n"
                "credential_source = Ec2InstanceMetadata\n"
            )
            env["AWS_CONFIG_FILE"] = str(tmp_path / "config")
            entry["profile"] = "it"
        running = node(env=env, s3_endpoint_url=bucket.url, retries=0, sources=[entry])
        running.pull("s3://models/m/")
        running.wait_for("pull ended", name="m")
        assert not metadata.requests
        running.configure(
            **{**running.options, "sources": [{"prefix": "s3://models/", "instance_role": True}]}
        )
        until(
            lambda: running.ask("GET", "/v1/sources").document["sources"][0]["columns"].get("instance_role")
        )
        running.pull("s3://models/m/")
        assert running.ready("m").status == 200
        assert metadata.requests


def test_the_role_of_the_machine_is_all_that_an_entry_that_names_it_uses(
    engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    with Bucket() as bucket, Metadata() as metadata:
        bucket.put("m/it", noise(KIB))
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        entry = {"prefix": "s3://models/", "endpoint": bucket.url, "instance_role": True}
        engine(sources=[entry]).pull("s3://models/m/")
        assert "AKIDENVIRONMENT" not in str(bucket.requests)


def test_a_pods_own_token_gets_keys_without_a_switch(
    engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("of the pod")
    with Bucket() as bucket, Sts(bucket) as sts, Metadata() as metadata:
        bucket.put("m/it", noise(KIB))
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        engine(s3_endpoint_url=bucket.url).pull("s3://models/m/")
        assert sts.tokens
        assert not metadata.requests


def test_the_container_credentials_that_a_platform_gives_a_pod_need_no_switch(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bucket() as bucket, Metadata() as agent:
        bucket.put("m/it", noise(KIB))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{agent.url}/v1/credentials")
        engine(s3_endpoint_url=bucket.url).pull("s3://models/m/")
        assert [seen.path for seen in agent.requests] == ["/v1/credentials"]


# --- refused digests ---

WEIGHTS, CONFIG = noise(2 * MIB), b'{"model_type": "x"}'
FILES = {"model.safetensors": WEIGHTS, "config.json": CONFIG}


def status_of(root: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((root / f"status/{name}.json").read_text()))
    except FileNotFoundError:
        return {}


def blob_of(root: Path, content: bytes) -> Path:
    hexadecimal = hashlib.sha256(content).hexdigest()
    return next((root / ".cachd/blobs").rglob(f"*{hexadecimal[4:]}"), root / "none")


def assert_refused(node: Node, name: str) -> None:
    until(lambda: status_of(node.root, name).get("state") == "refused")
    told = status_of(node.root, name)
    assert told["final"]
    assert told["error"]["code"] == "refused_digest"
    assert not (node.root / f"ready/{name}.json").exists()
    assert not (node.root / f"models/{name}").is_symlink()
    answer = node.ready(name, wait=0)
    assert (answer.status, answer.document["code"], answer.document["final"]) == (403, "refused_digest", True)


@pytest.mark.parametrize("where", ["option", "entry"])
@pytest.mark.parametrize("how", ["reload", "SIGHUP", "start"])
def test_a_refused_digest_is_withdrawn_from_every_model_at_once(
    alone: Callable[..., Ground], how: str, where: str
) -> None:
    """Promised: A refused digest is withdrawn from every model at once, and comes from no other source."""
    ground = alone()
    node = ground.node
    ground.hub.add("org/model", FILES)
    ground.hub.add("org/clean", {"config.json": CONFIG, "model.safetensors": noise(MIB, 9)})
    copied = ground.origin.add_model("copy", FILES)
    for ref in ("hf://org/model", "hf://org/clean", copied):
        node.pull(ref, pin=True)
    for name in ("org--model", "org--clean", "copy"):
        assert node.ready(name).status == 200
    blob = until(lambda: blob_of(node.root, WEIGHTS))
    assert blob.exists()
    if where == "option":
        refusing: dict[str, Any] = {"refuse": [digest(WEIGHTS)]}
    else:
        refusing = {"sources": [{"prefix": "hf://elsewhere/", "refuse": [digest(WEIGHTS)]}]}
    if how == "start":
        assert node.stop() == 0
    node.configure(**{**node.options, **refusing})
    if how == "SIGHUP":
        os.kill(node.pid, signal.SIGHUP)
    if how == "start":
        node.start()
    for name in ("org--model", "copy"):
        assert_refused(node, name)
    until(lambda: not blob.exists())
    assert node.ready("org--clean", wait=0).status == 200
    parts = (node.root / "hub").rglob("model.safetensors.*")
    assert not [path for path in parts if ".no_exist" not in path.parts], "nor a part of it"
    for ref in ("hf://org/model", copied):
        node.pull(ref)
    assert_refused(node, "copy")
    assert ground.origin.bytes_sent("/copy/model.safetensors") <= len(WEIGHTS), "no byte since"


def test_a_pod_that_holds_a_refused_model_keeps_its_files_and_then_they_go(
    alone: Callable[..., Ground],
) -> None:
    ground = alone()
    node = ground.node
    ground.hub.add("org/model", FILES)
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 200
    tree = (node.root / "models/org--model").resolve()
    with (node.root / "models/.holds" / tree.name).open("rb"):
        node.configure(**{**node.options, "refuse": [digest(WEIGHTS)]})
        assert_refused(node, "org--model")
        assert (tree / "model.safetensors").read_bytes() == WEIGHTS
        assert not list((node.root / "models").glob("org--model@*")), "no pod that starts now finds it"
    until(lambda: not tree.exists())
    until(lambda: not blob_of(node.root, WEIGHTS).exists())


def test_a_rollback_leads_to_no_refused_snapshot(alone: Callable[..., Ground]) -> None:
    """Though a pod still holds it."""
    ground = alone()
    node = ground.node
    ground.hub.add("org/model", FILES)
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 200
    tree = (node.root / "models/org--model").resolve()
    commit = ground.hub.add("org/model", {"config.json": CONFIG})
    with (node.root / "models/.holds" / tree.name).open("rb"):
        node.pull("hf://org/model", refresh=True)
        until(lambda: (node.ready("org--model", wait=0).document or {}).get("revision") == commit)
        node.configure(**{**node.options, "refuse": [digest(WEIGHTS)]})
        until(lambda: node.ask("GET", "/v1/models/org--model").document["previous"] == [])
        assert node.ask("POST", "/v1/models/org--model/rollback").document["code"] == "no_previous"
        assert (tree / "model.safetensors").exists()
    until(lambda: not blob_of(node.root, WEIGHTS).exists())
    assert node.ready("org--model", wait=0).status == 200


def test_a_pull_of_a_refused_digest_fails_for_good_before_a_byte(
    engine: Engines, hub: Hub, root: Path
) -> None:
    hub.add("org/model", FILES)
    running = engine(hf_endpoint=hub.url, refuse=[digest(WEIGHTS)])
    assert refused(lambda: running.pull("hf://org/model")) == "refused_digest"
    assert hub.cdn.bytes_sent() == 0
    running.pull("hf://org/model", exclude=("*.safetensors",))


def test_a_running_pull_of_a_digest_that_is_refused_meanwhile_fails_for_good(
    alone: Callable[..., Ground],
) -> None:
    ground = alone()
    node = ground.node
    content = noise(6 * MIB, seed=len("it.bin"))
    with ground.held("it.bin"):
        ref = ground.origin.add_model("m", {"it.bin": noise(6 * MIB, 3), "b": b"b"})
        hold = ground.origin.hold("/m/it.bin", after=MIB)
        node.pull(ref)
        assert hold.reached.wait(PATIENCE_SECONDS)
        node.configure(**{**node.options, "refuse": [digest(noise(6 * MIB, 3))]})
        assert_refused(node, "m")
        hold.release()
    assert node.ready("it.bin").status == 200
    assert (node.root / "models/it.bin/it.bin").read_bytes() == content
    until(lambda: not list((node.root / ".cachd/ingest").rglob("data")))


@pytest.mark.parametrize("source", ["small Hub file", "S3 checksum", "no digest at all"])
def test_a_file_that_its_source_names_by_no_sha256_is_refused_before_it_is_published(
    engine: Engines, hub: Hub, origin: Origin, root: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    keys(monkeypatch)
    hub.add("org/it", {"it.json": CONFIG})
    with Bucket() as bucket:
        checksum = base64.b64encode(zlib.crc32(CONFIG).to_bytes(4, "big")).decode()
        bucket.put("m/it", CONFIG, x_amz_checksum_crc32=checksum)
        ref = {
            "small Hub file": "hf://org/it",
            "S3 checksum": "s3://models/m/",
            "no digest at all": origin.add("/it", CONFIG),
        }[source]
        running = engine(hf_endpoint=hub.url, s3_endpoint_url=bucket.url, refuse=[digest(CONFIG)])
        assert refused(lambda: running.pull(ref, name="it")) == "refused_digest"
    assert running.store.names.get("it") is None
    assert not list((root / "models").glob("it*"))
    assert not [path for path in (root / ".cachd/blobs").rglob("*") if path.is_file()]


def test_the_revision_of_a_model_can_be_refused(engine: Engines, origin: Origin) -> None:
    ref = origin.add_model("m", {"a": b"a"})
    listing = f"{hashlib.sha256(b'a').hexdigest()}  a\n".encode()
    assert refused(lambda: engine(refuse=[digest(listing)]).pull(ref)) == "refused_digest"
    assert not origin.bytes_sent("/m/a")


def test_a_digest_that_is_refused_no_more_may_be_pulled_again(alone: Callable[..., Ground]) -> None:
    ground = alone(refuse=[digest(WEIGHTS)])
    node = ground.node
    ground.hub.add("org/model", FILES)
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 403
    node.configure(**{**node.options, "refuse": []})
    until(lambda: node.ask("GET", "/v1/sources?ref=org/model").document["refused_digests"] == [])
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 200


def test_a_refusal_names_the_entry(engine: Engines, hub: Hub) -> None:
    running = engine(hf_endpoint=hub.url, sources=[{"prefix": "hf://evil/", "refuse": True}])
    with pytest.raises(Forbidden, match="hf://evil/"):
        running.pulls.previews.resolve(spec_of("hf://evil/model"))
