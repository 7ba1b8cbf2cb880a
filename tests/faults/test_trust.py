"""Whom an origin must be, and what it never learns (rows D)."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.signers import RequestSigner

from cachd.errors import CachdError, Forbidden, Unavailable
from cachd.model import Extent, Ref
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.source import Source
from tests.conftest import Engine, spec_of
from tests.fetching import http
from tests.ground.bucket import Bucket, Refused, Sts, Throttled
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Redirect, Server, Tls
from tests.ground.proxied import refusal_of
from tests.ground.scripted import Scripted

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
EITHER = ("GET", "HEAD")
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


# --- D1: certificates ---

WRONG = {
    "expired": Tls(from_days=-2, to_days=-1),
    "of another host": Tls(hosts=("other.example", "127.0.0.9")),
}


@pytest.mark.parametrize("tls", WRONG.values(), ids=WRONG.keys())
def test_a_certificate_that_is_wrong_is_refused_even_of_a_trusted_authority(tls: Tls) -> None:
    with Origin(tls=tls) as origin:
        url = origin.add("/x", noise(KIB))
        error = refusal_of(lambda: http(ca_file=origin.ca_file).head(url, CancelToken()))
        assert (type(error), error.code) == (Forbidden, "tls_untrusted")
        assert origin.requests == []


def test_a_certificate_that_is_not_yet_valid_may_be_the_clocks_fault_and_is_asked_for_again() -> None:
    with Origin(tls=Tls(from_days=1, to_days=2)) as origin:
        url = origin.add("/x", noise(KIB))
        error = refusal_of(lambda: http(ca_file=origin.ca_file).head(url, CancelToken()))
        assert (type(error), error.code) == (Unavailable, "clock_skewed")
        assert origin.requests == []


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_an_origin_that_speaks_only_tls_of_old_is_refused(tmp_path: Path, newest: ssl.TLSVersion) -> None:
    old = Tls(newest=newest).context(tmp_path / "ca.pem")

    def speaks(connection: socket.socket, _: int) -> None:
        old.wrap_socket(connection, server_side=True)

    with Scripted(speaks) as server:
        url = server.url.replace("http:", "https:")
        error = refusal_of(lambda: http(ca_file=tmp_path / "ca.pem").head(url, CancelToken()))
    assert (type(error), error.code) == (Forbidden, "tls_too_old")


# --- D2: authorities that come, go and change ---


@pytest.mark.parametrize("content", [None, b"", b"no certificate"], ids=["absent", "empty", "garbage"])
def test_authorities_that_vanish_are_told_and_new_ones_are_taken_over(
    tmp_path: Path, content: bytes | None
) -> None:
    with Origin(tls=True) as origin:
        assert origin.ca_file is not None
        url = origin.add("/x", noise(KIB), headers={"Connection": "close"})
        ca_file = tmp_path / "ca.pem"
        ca_file.write_bytes(origin.ca_file.read_bytes())
        asking = http(ca_file=ca_file)
        assert asking.head(url, CancelToken()).file_size == KIB
        ca_file.unlink()
        if content is not None:
            ca_file.write_bytes(content)
        error = refusal_of(lambda: asking.head(url, CancelToken()))
        assert (type(error), error.code) == (Unavailable, "bad_ca_file")
        assert error.withheld["file"] == str(ca_file)
        assert str(ca_file) not in str(error.as_document())
        origin.certify_anew()
        ca_file.write_bytes(origin.ca_file.read_bytes())
        assert asking.head(url, CancelToken()).file_size == KIB


def test_an_authority_that_is_no_longer_listed_is_no_longer_believed(tmp_path: Path) -> None:
    with Origin(tls=True) as origin, Origin(tls=True) as other:
        assert origin.ca_file is not None
        assert other.ca_file is not None
        url = origin.add("/x", noise(KIB), headers={"Connection": "close"})
        ca_file = tmp_path / "ca.pem"
        ca_file.write_bytes(origin.ca_file.read_bytes())
        asking = http(ca_file=ca_file)
        asking.head(url, CancelToken())
        ca_file.write_bytes(other.ca_file.read_bytes())
        assert refusal_of(lambda: asking.head(url, CancelToken())).code == "tls_untrusted"


def test_the_same_authorities_are_believed_for_listings_and_for_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bucket: Bucket
) -> None:
    with Hub(tls=True) as hub, Bucket(tls=True) as safe:
        hub.add("org/m", {"config.json": b"{}"})
        safe.put("m/it", noise(KIB))
        for server, source_of, ref in (
            (hub, hub_source, "hf://org/m"),
            (safe, bucket_source, "s3://models/m/"),
        ):
            known, absent = source_of(server, server.ca_file), source_of(server, tmp_path / "absent")
            assert known.resolve(Ref.parse(ref), CancelToken()).files
            unknown = source_of(server, None)
            with pytest.raises((Forbidden, Unavailable)):
                unknown.resolve(Ref.parse(ref), CancelToken())
            error = refusal_of(lambda absent=absent, ref=ref: absent.resolve(Ref.parse(ref), CancelToken()))
            assert error.code == "bad_ca_file"


def hub_source(hub: Server, ca_file: Path | None = None, token: Secret | None = None) -> Source:
    return HubSource(http(ca_file=ca_file), endpoint=hub.url, token=token or Secret(None))


def bucket_source(bucket: Server, ca_file: Path | None = None) -> Source:
    return BucketSource(http(ca_file=ca_file), Service(bucket.url, "us-east-1"))


# --- D3: a listing that redirects ---


def test_a_hub_that_redirects_its_listing_elsewhere_does_not_get_the_token_there(
    hub: Hub, origin: Origin, tmp_path: Path
) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    (tmp_path / "token").write_text(hub.token)
    source = hub_source(hub, token=Secret(tmp_path / "token"))
    path = "/api/models/org/m/revision/main"
    hub.fault(path, Redirect(f"{origin.url}/elsewhere"), times=1)
    with suppress(CachdError):  # a listing that is not there may be read in another way
        source.resolve(Ref.parse("hf://org/m@main"), CancelToken())
    assert origin.requests
    assert {seen.headers.get("authorization") for seen in origin.requests} == {None}
    hub.fault(path, Redirect("http://169.254.169.254/latest/meta-data"), times=1)
    assert (
        refusal_of(lambda: source.resolve(Ref.parse("hf://org/m@main"), CancelToken())).code
        == "private_address"
    )
    hub.fault(path, Redirect("/api/models/org/m?blobs=true"), times=1)
    assert source.resolve(Ref.parse("hf://org/m@main"), CancelToken()).files
    assert hub.requests[-1].headers["authorization"] == f"Bearer {hub.token}"


# --- D5: what the environment may not decide ---


def test_neither_proxies_nor_a_netrc_of_the_environment_have_a_say(
    hub: Hub, origin: Origin, bucket: Bucket, node: Nodes, tmp_path: Path
) -> None:
    hub.add("org/m", {"config.json": b"{}", "it.bin": noise(2 * MIB)})
    bucket.put("m/it", noise(MIB))
    ref = origin.add("/it", noise(MIB))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text("machine 127.0.0.1 login canary password canary\n")
    (tmp_path / "home/.netrc").chmod(0o600)
    with Scripted(lambda connection, _: None) as proxy:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {name: proxy.url for upper in names for name in (upper, upper.lower())}
        env |= {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home/.netrc"), "NO_PROXY": ""}
        running = node(env=env, hf_endpoint=hub.url, s3_endpoint_url=bucket.url, retries=0)
        for number, asked in enumerate((ref, "hf://org/m", "s3://models/m/")):
            running.pull(asked, name=f"m{number}")
            answer = running.ready(f"m{number}")
            assert answer.status == 200, answer.document
        assert proxy.accepted == 0
    seen = [*hub.requests, *hub.cdn.requests, *origin.requests]
    assert not [each for each in seen if "authorization" in each.headers]


# --- D6: credentials that expire ---


def test_keys_that_expire_in_mid_pull_are_read_again_from_their_file(
    bucket: Bucket, root: Path, engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    told = "[default]\naws_access_key_id = {}\naws_secret_access_key = said-to-nobody\n"
    file.write_text(told.format("AKIDOLD"))
    bucket.access_keys = {"AKIDOLD"}
    path = bucket.put("m/it", noise(12 * MIB))
    hold = bucket.hold(path, after=MIB)
    running = engine(streams=1, s3_endpoint_url=bucket.url)
    pulled = running.pulls.start(spec_of("s3://models/m/"))
    assert pulled is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    file.write_text(told.format("AKIDNEW"))
    bucket.access_keys = {"AKIDNEW"}
    hold.release()
    pulled.done.result(PATIENCE_SECONDS)
    assert (root / "models/m/it").read_bytes() == noise(12 * MIB)
    assert bucket.bytes_sent(path) - 12 * MIB < KIB, "no byte twice, beside a refusal"


def test_the_token_of_a_pod_is_read_again_when_its_role_expired_though_sts_is_busy(
    bucket: Bucket, root: Path, engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("first")
    with Sts(bucket) as sts:
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        path = bucket.put("m/it", noise(12 * MIB))
        hold = bucket.hold(path, after=MIB)
        running = engine(streams=1, s3_endpoint_url=bucket.url)
        pulled = running.pulls.start(spec_of("s3://models/m/"))
        assert pulled is not None
        assert hold.reached.wait(PATIENCE_SECONDS)
        (tmp_path / "token").write_text("second")
        bucket.access_keys = set()
        sts.fault("*", Throttled(), times=1, methods=["POST"])
        hold.release()
        pulled.done.result(PATIENCE_SECONDS)
        assert {"first", "second"} == set(sts.tokens)
    assert (root / "models/m/it").read_bytes() == noise(12 * MIB)


def test_the_parts_of_an_object_share_one_signature(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    signed: list[object] = []
    sign = RequestSigner.generate_presigned_url

    def noted(signer: RequestSigner, *args: Any, **more: Any) -> Any:
        signed.append(more)
        return sign(signer, *args, **more)

    monkeypatch.setattr(RequestSigner, "generate_presigned_url", noted)
    path = bucket.put("m/it", noise(4 * KIB))
    source = bucket_source(bucket)
    (file,) = source.resolve(Ref.parse("s3://models/m/"), CancelToken()).files
    for start in range(0, 4 * KIB, KIB):
        with source.open(file, Extent(start, start + KIB), CancelToken()) as body:
            assert body.readinto(memoryview(bytearray(KIB))) == KIB
    assert len([seen for seen in bucket.requests if (seen.method, seen.path) == ("GET", path)]) == 4
    assert len(signed) == 1


def test_a_profile_that_is_not_there_is_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    error = refusal_of(lambda: bucket_source(bucket).resolve(Ref.parse("s3://models/m/"), CancelToken()))
    assert (error.code, "absent" in error.detail) == ("source_unauthorized", True)


def test_credentials_that_cannot_be_got_may_be_there_later(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[profile broken]\ncredential_process = false\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "broken")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    error = refusal_of(lambda: bucket_source(bucket).resolve(Ref.parse("s3://models/m/"), CancelToken()))
    assert (error.code, error.retryable) == ("credentials_failed", True)
    assert bucket.requests == []


def test_an_archived_bucket_is_told_as_such(bucket: Bucket) -> None:
    bucket.put("m/model.bin", noise(KIB))
    bucket.fault("/models", Refused(403, "InvalidObjectState"))
    error = refusal_of(lambda: bucket_source(bucket).resolve(Ref.parse("s3://models/m/"), CancelToken()))
    assert (type(error), error.code) == (Forbidden, "archived")
    assert error.hint.startswith("restore it first")


def test_a_token_of_the_hub_that_is_replaced_in_mid_pull_is_taken_over(
    hub: Hub, root: Path, engine: Engines, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(hub.token)
    hub.add("org/m", {f"{number}.bin": noise(2 * MIB, number) for number in range(4)}, private=True)
    hold = hub.cdn.hold("*", after=MIB)
    running = engine(streams=1, hf_endpoint=hub.url, hf_token_file=tmp_path / "token")
    pulled = running.pulls.start(spec_of("hf://org/m"))
    assert pulled is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    old, hub.token = hub.token, "hf_another"
    (tmp_path / "token").write_text("hf_another\n")
    hold.release()
    pulled.done.result(PATIENCE_SECONDS)
    used = [seen.headers["authorization"] for seen in hub.requests]
    assert (used[0], used[-1]) == (f"Bearer {old}", "Bearer hf_another")


# --- D7: secrets that are missing ---


def test_a_source_whose_secret_is_missing_fails_alone_and_works_once_it_is_there(
    hub: Hub, origin: Origin, node: Nodes, tmp_path: Path
) -> None:
    hub.add("org/m", {"config.json": b"{}"}, private=True)
    token = tmp_path / "token"
    running = node(hf_endpoint=hub.url, hf_token_file=str(token), retries=0)
    running.pull("hf://org/m")
    answer = running.ready("org--m")
    assert (answer.status, answer.document["code"]) == (400, "bad_secret")
    assert str(token) not in repr(answer.document)
    assert running.wait_for("pull ended", name="org--m")["withheld"]["secret"] == str(token)
    running.pull(origin.add("/it", noise(KIB)))
    assert running.ready("it").status == 200
    token.write_text(f"{hub.token}\r\n")
    token.chmod(0o644)  # as the kubelet leaves it
    running.pull("hf://org/m")
    assert running.ready("org--m").status == 200


# --- D9: two tenants ---


def test_what_one_token_brought_every_pod_of_the_node_may_read(
    hub: Hub, engine: Engines, tmp_path: Path
) -> None:
    """docs/sources.md: "Every pod of the node may read what a token fetched"."""
    (tmp_path / "token").write_text(hub.token)
    hub.add("org/m", {"config.json": b"{}"}, gated=True)
    running = engine(hf_endpoint=hub.url, hf_token_file=tmp_path / "token")
    running.pull("hf://org/m")
    hub.revoke("org/m")
    (tmp_path / "token").write_text("hf_of-another-tenant")
    hub.forget()
    assert running.pull("hf://org/m").name == "org--m"
    assert hub.requests == []


# --- D11: what a dead process tells ---


def test_no_core_is_written_and_a_secret_of_a_file_is_not_in_the_environment(
    hub: Hub, node: Nodes, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(hub.token)
    hub.add("org/m", {"config.json": b"{}"}, private=True)
    running = node(hf_endpoint=hub.url, hf_token_file=str(tmp_path / "token"))
    running.pull("hf://org/m")
    assert running.ready("org--m").status == 200
    (limit,) = [
        line for line in Path(f"/proc/{running.pid}/limits").read_text().splitlines() if "core file" in line
    ]
    assert limit.split()[4:6] == ["0", "0"]
    for name in ("environ", "cmdline"):
        assert hub.token.encode() not in Path(f"/proc/{running.pid}/{name}").read_bytes()
