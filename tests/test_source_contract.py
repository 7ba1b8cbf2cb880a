"""Runs the contract of sources (contract_source.py) against every source of cachd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cachd.model import SCHEMES, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.aws import Keys
from cachd.sources.buckets import Service
from cachd.sources.huggingface import HubSource
from cachd.sources.modelscope import ModelScopeSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.shared_volume import SharedVolumeSource
from cachd.sources.web import WebSource
from tests.contract_source import FILES, LARGE, OTHER_BYTES, Served, SourceContract
from tests.fetching import http
from tests.ground.bucket import Bucket
from tests.ground.hub import Hub
from tests.ground.models import write_sha256sums
from tests.ground.modelscope import ModelScope
from tests.ground.origin import Origin
from tests.ground.s3 import S3Server
from tests.test_hub_cache import COMMIT, add_snapshot


def web(origin: Origin) -> Served:
    return Served(
        WebSource(http(ca_file=origin.ca_file)),
        ref=Ref.parse(origin.add_model("model", FILES)),
        absent=Ref.parse(f"{origin.url}/absent/"),
        change=lambda: origin.add_model("model", {**FILES, LARGE: OTHER_BYTES}),
    )


class TestHttp(SourceContract):
    @pytest.fixture
    def served(self, origin: Origin) -> Served:
        return web(origin)


class TestHttps(SourceContract):
    @pytest.fixture
    def served(self) -> Iterator[Served]:
        with Origin(tls=True) as origin:
            yield web(origin)


def test_the_source_of_every_scheme_keeps_the_contract() -> None:
    """A new scheme needs a class here."""
    tested = {
        "http": TestHttp,
        "https": TestHttps,
        "hf": TestHub,
        "ms": TestModelScope,
        "s3": TestBucket,
        "file": TestSharedVolume,
    }
    assert tested.keys() == SCHEMES.keys()


class TestSharedVolume(SourceContract):
    @pytest.fixture
    def served(self, tmp_path: Path) -> Served:
        for path, content in FILES.items():
            (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / path).write_bytes(content)
        write_sha256sums(tmp_path / "model")
        (tmp_path / "other").write_bytes(OTHER_BYTES)
        return Served(
            SharedVolumeSource(AddressPolicy([f"file://{tmp_path}/"]), stall_seconds=60),
            ref=Ref.parse(f"file://{tmp_path}/model"),
            absent=Ref.parse(f"file://{tmp_path}/absent"),
            change=lambda: (tmp_path / "other").replace(tmp_path / "model" / LARGE),
        )


class TestHubCache(SourceContract):
    """A repository of a Hub cache on a shared volume."""

    @pytest.fixture
    def served(self, tmp_path: Path) -> Served:
        repository = tmp_path / "models--org--model"
        model = add_snapshot(repository, FILES, COMMIT, "main") / LARGE
        (tmp_path / "other").write_bytes(OTHER_BYTES)
        return Served(
            SharedVolumeSource(AddressPolicy([f"file://{tmp_path}/"]), stall_seconds=60),
            ref=Ref.parse(f"file://{repository}@main"),
            absent=Ref.parse(f"file://{repository}@absent"),
            change=lambda: (tmp_path / "other").replace(model.resolve()),
        )


def of_hub(hub: Hub, repo: str) -> Served:
    hub.add(repo, FILES)
    return Served(
        HubSource(http(), endpoint=hub.url, token=Secret(None)),
        ref=Ref.parse(f"hf://{repo}"),
        absent=Ref.parse(f"hf://{repo}@absent"),  # for an absent repository the Hub may answer 401
        change=None,
    )


class TestHub(SourceContract):
    @pytest.fixture(params=["org/model", "datasets/org/data", "kernels/org/kernel"])
    def served(self, hub: Hub, request: pytest.FixtureRequest) -> Served:
        return of_hub(hub, request.param)


class TestMirrorOfTheHub(SourceContract):
    """Mirrors that do not answer all that the Hub does."""

    @pytest.fixture(params=["blobs", "blobs tree", "lfs tree linked shortened refs"])
    def served(self, hub: Hub, request: pytest.FixtureRequest) -> Served:
        hub.lacks = set(request.param.split())
        return of_hub(hub, "org/model")


class TestModelScope(SourceContract):
    @pytest.fixture
    def served(self) -> Iterator[Served]:
        with ModelScope() as scripted:
            scripted.add("org/model", FILES)
            yield Served(
                ModelScopeSource(http(), endpoint=scripted.url, token=Secret(None)),
                ref=Ref.parse("ms://org/model"),
                absent=Ref.parse("ms://org/absent"),
                change=None,
            )


class TestBucket(SourceContract):
    @pytest.fixture
    def served(self, bucket: Bucket) -> Served:
        return of_bucket(bucket, Keys())


class TestS3Server(SourceContract):
    """A real S3 server, with a checksum of each object."""

    @pytest.fixture
    def served(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
        prefix = tmp_path.name
        for path, content in FILES.items():
            s3.put("contract", f"{prefix}/{path}", content, checksum="SHA256")
        return Served(
            BucketSource(http(), Service(s3.url, s3.region)),
            ref=Ref.parse(f"s3://contract/{prefix}/"),
            absent=Ref.parse("s3://contract/absent/"),
            change=lambda: s3.put("contract", f"{prefix}/{LARGE}", OTHER_BYTES, checksum="SHA256"),
        )


class TestPublicBucket(SourceContract):
    """A bucket that anybody may read, without credentials."""

    @pytest.fixture
    def served(self) -> Iterator[Served]:
        with Bucket() as bucket:
            bucket.ways.is_public, bucket.access_keys = True, set()
            yield of_bucket(bucket, Keys(are_none=True))
            assert not [seen for seen in bucket.requests if "authorization" in seen.headers]


def of_bucket(bucket: Bucket, keys: Keys) -> Served:
    for path, content in FILES.items():
        bucket.put(f"model/{path}", content)
    return Served(
        BucketSource(http(), Service(bucket.url, "us-east-1"), keys),
        ref=Ref.parse("s3://models/model/"),
        absent=Ref.parse("s3://models/absent/"),
        change=lambda: bucket.put(f"model/{LARGE}", OTHER_BYTES, etag="two"),
    )
