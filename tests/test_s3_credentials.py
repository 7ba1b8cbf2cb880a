"""Credentials of S3: where AWS clients look for them, what their absence is called, and their renewal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha1
from pathlib import Path

import pytest
from botocore.credentials import SSOProvider

from cachd.sources.buckets import Service
from cachd.sources.s3 import BucketSource
from tests.conftest import Engine, spec_of
from tests.fetching import MIB, PATIENCE_SECONDS, http, refused, resolve
from tests.ground.bucket import Bucket, Refused
from tests.ground.models import noise
from tests.ground.origin import File, Origin, Reply, Seen, Server

Engines = Callable[..., Engine]

KEYS = "aws_access_key_id = {}\naws_secret_access_key = said to nobody\n"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A bucket, on a node whose AWS configuration is empty."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "PROFILE", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with Bucket() as started:
        started.put("m/it", noise(9 * MIB))
        yield started


def source(bucket: Bucket) -> BucketSource:
    return BucketSource(http(), Service(bucket.url))


# --- where they come from ---


@pytest.mark.parametrize("file", ["config", "credentials"])
def test_the_profile_and_the_files_of_the_environment_are_honoured(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    head = "[profile mine]\n" if file == "config" else "[mine]\n"
    (tmp_path / file).write_text(f"{head}region = eu-west-3\n{KEYS.format('AKIDSCRIPTED')}")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert resolve(source(bucket), "s3://models/m/").files
    if file == "config":
        assert "/eu-west-3/s3/" in bucket.requests[0].headers["authorization"]


def test_a_profile_that_is_nowhere_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    error = refused(lambda: resolve(source(bucket), "s3://models/m/"), "source_unauthorized")
    assert "nowhere" in error.detail
    assert "AWS_PROFILE" in error.hint


def test_a_wrong_secret_key_is_told_apart_from_a_missing_permission(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(f"[default]\n{KEYS.format('AKIDUNKNOWN')}")
    error = refused(lambda: resolve(source(bucket), "s3://models/m/"), "source_unauthorized")
    assert "secret key" in error.hint
    (tmp_path / "credentials").write_text(f"[default]\n{KEYS.format('AKIDSCRIPTED')}")
    bucket.ways.may_list = False
    error = refused(lambda: resolve(source(bucket), "s3://models/m/"), "source_forbidden")
    assert "s3:ListBucket" in error.hint


class Portal(Server):
    """Identity Center by script: it gives the keys of a role for the token of a login."""

    token = "of the login"

    def find(self, seen: Seen) -> Reply:
        if seen.headers.get("x-amz-sso_bearer_token") != self.token:
            body = {"__type": "UnauthorizedException", "message": "Session token not found or invalid"}
            told = {"Content-Type": "application/json", "X-Amzn-Errortype": "UnauthorizedException"}
            return Reply.of(401, told, json.dumps(body).encode())
        keys = {"accessKeyId": "AKIDSCRIPTED", "secretAccessKey": "x", "sessionToken": "x"}
        role = {"roleCredentials": {**keys, "expiration": 4_000_000_000_000}}
        return Reply.of(200, {"Content-Type": "application/json"}, json.dumps(role).encode())


SSO = """[profile sso]
sso_start_url = https://start.example
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = reader
"""


def test_a_login_of_identity_center_gives_keys_until_it_expires(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(SSO)
    monkeypatch.setenv("AWS_PROFILE", "sso")
    pulls = partial(resolve, source(bucket), "s3://models/m/")
    error = refused(pulls, "credentials_expired")
    assert "aws sso login" in error.hint
    # botocore read HOME when it was imported, and other tests had another.
    monkeypatch.setattr(SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(tmp_path))
    login = {"accessToken": Portal.token, "expiresAt": "2099-01-01T00:00:00Z", "region": "us-east-1"}
    file = tmp_path / f"{sha1(b'https://start.example').hexdigest()}.json"
    file.write_text(json.dumps(login))
    with Portal() as portal:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", portal.url)
        assert pulls().files
        assert portal.requests
        file.write_text(json.dumps({**login, "accessToken": "ended"}))
        assert "aws sso login" in refused(pulls, "credentials_expired").hint


class Agent(Server):
    """EKS Pod Identity's agent by script: it gives keys for the token of a pod, others each time."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__()
        self._bucket = bucket
        self.tokens: list[str] = []

    def find(self, seen: Seen) -> Reply:
        self.tokens.append(seen.headers.get("authorization", ""))
        key = f"AKIDPOD{len(self.tokens)}"
        self._bucket.access_keys = {key}
        keys = {"AccessKeyId": key, "SecretAccessKey": "x", "Token": "x"}
        body = json.dumps({**keys, "Expiration": "2099-01-01T00:00:00Z"})
        return Reply.of(200, {"Content-Type": "application/json"}, body.encode())


def test_pod_identity_gives_keys_for_the_token_in_the_file_of_the_pod(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("first")
    with Agent(bucket) as agent:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{agent.url}/v1/credentials")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        assert resolve(source(bucket), "s3://models/m/").files
        (tmp_path / "token").write_text("second")
        assert resolve(source(bucket), "s3://models/m/").files
        assert agent.tokens == ["first", "second"]


# --- when they expire ---


class Expiring(Bucket):
    """A bucket that answers to old keys as AWS does: 400, with the reason in the body."""

    valid = "AKIDOLD"

    def find(self, seen: Seen) -> File | Reply:
        self.access_keys = {"AKIDOLD", "AKIDNEW"}
        if self.valid not in f"{seen.query} {seen.headers.get('authorization', '')}":
            return Refused(400, "ExpiredToken").reply(seen, Reply.of(400, {}))
        return super().find(seen)


@pytest.mark.parametrize("when", ["in a listing", "in a download"])
def test_a_token_that_expires_in_the_middle_of_a_pull_is_renewed(
    bucket: Bucket, engine: Engines, root: Path, tmp_path: Path, when: str
) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[default]\n{KEYS.format('AKIDOLD')}")
    with Expiring() as expiring:
        path = expiring.put("m/it", noise(12 * MIB))
        hold = expiring.hold(path if when == "in a download" else "/models", after=1)
        begun = engine(streams=1, s3_endpoint_url=expiring.url, retries=0).begin(spec_of("s3://models/m/"))
        assert hold.reached.wait(PATIENCE_SECONDS)
        file.write_text(f"[default]\n{KEYS.format('AKIDNEW')}")
        expiring.valid = "AKIDNEW"
        hold.release()
        begun.done.result(PATIENCE_SECONDS)
        assert (root / "models/m/it").read_bytes() == noise(12 * MIB)


def test_a_token_that_is_not_renewed_in_time_is_named(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(f"[default]\n{KEYS.format('AKIDOLD')}")
    with Expiring() as expiring:
        expiring.put("m/it", b"x")
        expiring.valid = "AKIDNEW"
        refused(lambda: resolve(source(expiring), "s3://models/m/"), "credentials_expired")
        assert len(expiring.requests) == 2, "renewed once"


# --- a CDN in front of a bucket ---


def test_the_cookies_of_a_cdn_come_from_a_file_and_go_to_its_host_alone(
    origin: Origin, engine: Engines, root: Path, tmp_path: Path
) -> None:
    """As of CloudFront: three signed cookies open every file below a path; without them it answers 403."""
    cookies = "CloudFront-Policy=eyJ; CloudFront-Signature=abc~-_; CloudFront-Key-Pair-Id=K2"
    (tmp_path / "headers").write_text(f"Cookie: {cookies}\n")
    files = {"config.json": b"{}", "model.bin": noise(MIB)}
    ref = origin.add_model("cdn", files)
    for path in (*files, "SHA256SUMS"):
        origin.fault(
            f"/cdn/{path}",
            Refused(403, "MissingKey"),
            when=lambda seen: seen.headers.get("cookie") != cookies,
            methods=["GET", "HEAD"],
        )
    running = engine(sources=[{"prefix": ref, "headers_file": str(tmp_path / "headers")}])
    running.pull(ref)
    assert (root / "models/cdn/model.bin").read_bytes() == files["model.bin"]
    running.pull(origin.add("/other", b"x"))
    assert not [seen for seen in origin.requests if seen.path == "/other" and "cookie" in seen.headers]
