"""cachd among other tools: their variables, their logins, their authorities, and homes that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from cachd.errors import Invalid
from cachd.sources.secrets import HubToken
from tests.ground.bucket import Bucket
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem

KIB = 1 << 10
Nodes = Callable[..., Node]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nobody has logged in."""
    made = tmp_path / "home"
    made.mkdir()
    monkeypatch.setenv("HOME", str(made))
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return made


def logged_in(folder: Path, token: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").write_text(f"{token}\n")
    return folder / "token"


# --- the Hub token ---


def test_the_hub_token_is_found_where_the_hub_s_own_tools_find_it_and_in_their_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = HubToken(None)
    assert token.read() is None
    logged_in(home / ".cache/huggingface", "of-home")
    assert token.read() == "of-home"
    logged_in(tmp_path / "xdg/huggingface", "of-xdg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token.read() == "of-xdg"
    logged_in(home / "hf", "of-hf-home")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert token.read() == "of-hf-home"
    monkeypatch.setenv("HF_TOKEN_PATH", str(logged_in(tmp_path / "named", "of-path")))
    assert token.read() == "of-path"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "of-old-variable")
    assert token.read() == "of-old-variable"
    monkeypatch.setenv("HF_TOKEN", " of-variable\n")
    assert token.read() == "of-variable"
    assert HubToken(logged_in(tmp_path / "option", "of-option")).read() == "of-option"
    monkeypatch.setenv("HF_TOKEN", " ")
    assert token.read() == "of-old-variable"


def test_who_forbids_to_send_a_login_unasked_is_heard(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = logged_in(home / ".cache/huggingface", "of-home")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert HubToken(None).read() is None
    assert HubToken(file).read() == "of-home"


def test_a_login_is_read_again_at_every_use(home: Path) -> None:
    token = HubToken(None)
    for told in ("first", "second"):
        logged_in(home / ".cache/huggingface", told)
        assert token.read() == told
    (home / ".cache/huggingface/token").unlink()
    assert token.read() is None


def test_a_variable_that_names_no_token_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        monkeypatch.setenv("HF_TOKEN_PATH", str(path))
        with pytest.raises(Invalid) as refusal:
            HubToken(None).read()
        assert refusal.value.code == "bad_secret"
        assert refusal.value.withheld["secret"] == f"{path} (HF_TOKEN_PATH)"
        assert refusal.value.hint


def test_a_daemon_that_is_to_stay_offline_asks_no_hub_and_says_so_for_good(node: Nodes, hub: Hub) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    running = node(env={"HF_HUB_OFFLINE": "1"}, hf_endpoint=hub.url)
    running.pull("hf://org/m")
    refused = running.ready("org--m")
    assert_problem(refused, 400, "offline")
    assert refused.document["final"] is True
    assert "HF_HUB_OFFLINE" in refused.document["detail"]
    assert hub.requests == []


def test_pods_may_read_both_views_whatever_the_umask_of_who_starts_the_daemon(
    tmp_path: Path, hub: Hub
) -> None:
    hub.add("org/m", {"config.json": b"{}", "sub/deep/model.bin": noise(KIB)})
    strict = ("sh", "-c", 'umask 077; exec "$@"', "sh")
    with Node(tmp_path / "node", {"hf_endpoint": hub.url}, before=strict) as running:
        running.pull("hf://org/m")
        assert running.ready("org--m").status == 200
        closed = [
            f"{path.relative_to(running.root)} {path.stat().st_mode:o}"
            for place in ("hub", "models", "ready", "status")
            for path in (running.root / place, *(running.root / place).rglob("*"))
            if path.stat().st_mode & (0o055 if path.is_dir() else 0o044)
            != (0o055 if path.is_dir() else 0o044)
        ]
        assert closed == []
        assert running.root.joinpath(".cachd").stat().st_mode & 0o077 == 0


ODD: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "too long": lambda path: path.write_bytes(b"x" * (64 * KIB + 1)),
    "binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "two lines": lambda path: path.write_text("canary\ncanary"),
    "of another user": lambda path: (path.write_text("canary"), path.chmod(0)),
}


@pytest.mark.parametrize("made", ODD.values(), ids=ODD.keys())
def test_a_login_that_cannot_be_read_is_told_once_and_then_nobody_is_logged_in(
    home: Path, made: Callable[[Path], object]
) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    file = home / ".cache/huggingface/token"
    made(file)
    if file.is_file() and not file.stat().st_mode & 0o777 and os.access(file, os.R_OK):
        pytest.skip("this user is root, who may read a file of mode 000")
    token = HubToken(None)
    with structlog.testing.capture_logs() as logged:
        assert [token.read(), token.read()] == [None, None]
    assert [(entry["log_level"], entry["file"]) for entry in logged] == [("warning", str(file))]
    assert "canary" not in repr(logged)


@pytest.mark.parametrize("home", ["~nobody-at-all/hf", "/", "/proc/self/mem", ""])
def test_a_home_that_is_none_holds_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    logged_in(tmp_path / "~nobody-at-all/hf", "of-the-working-directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", home)
    assert HubToken(None).read() is None


@pytest.mark.parametrize("home", [["env", "-u", "HOME"], ["env", "HOME=/"], ["env", "HOME="]], ids=str)
def test_a_daemon_whose_home_is_none_pulls_all_the_same(
    hub: Hub, bucket: Bucket, tmp_path: Path, home: list[str]
) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    bucket.put("m/it", noise(KIB))
    options = {"hf_endpoint": hub.url, "s3_endpoint_url": bucket.url, "retries": 0}
    before = [*home, "-u", "HF_HOME"] if "-u" in home else ["env", "-u", "HF_HOME", *home[1:]]
    with Node(tmp_path / "node", options, before=before, **KEYS) as running:
        for ref in ("hf://org/m", "s3://models/m/"):
            running.pull(ref, name="m", refresh=True)
            assert running.ready("m").status == 200, running.output


def test_a_hub_of_the_environment_is_asked_with_the_login_and_its_store_without(
    hub: Hub, node: Nodes, home: Path
) -> None:
    """The token goes to the endpoint in force, as with the Hub's own tools, and to nobody else."""
    hub.add("org/private", {"config.json": b"{}", "model.safetensors": noise(2 << 20)}, private=True)
    logged_in(home / ".cache/huggingface", hub.token)
    running = node(env={"HF_ENDPOINT": hub.url, "HF_HOME": ""}, retries=0)
    running.pull("hf://org/private")
    assert running.ready("org--private").status == 200, running.output
    assert {seen.headers.get("authorization") for seen in hub.requests} == {f"Bearer {hub.token}"}
    assert hub.cdn.requests
    assert not hub.leaked
    assert hub.token not in running.output + json.dumps(running.ask("GET", "/v1/options").document)


def test_the_option_names_the_hub_before_the_environment_does(hub: Hub, node: Nodes) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    with Hub() as other:
        running = node(env={"HF_ENDPOINT": other.url}, hf_endpoint=hub.url, retries=0)
        running.pull("hf://org/m")
        assert running.ready("org--m").status == 200
        assert not other.requests


# --- S3 ---

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDSCRIPTED", "AWS_SECRET_ACCESS_KEY": "said to nobody"}


@pytest.fixture
def bucket() -> object:
    with Bucket() as started:
        yield started


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_s3_server_of_the_environment_is_within_reach_as_that_of_the_option_is(
    bucket: Bucket, node: Nodes, variable: str
) -> None:
    bucket.put("m/it", noise(KIB))
    running = node(env={**KEYS, variable: bucket.url, "AWS_REGION": "eu-north-7"}, allow=[], retries=0)
    running.pull("s3://models/m/")
    assert running.ready("m").status == 200, running.output
    signed = [seen.headers.get("authorization", "") + seen.query for seen in bucket.requests]
    assert all("eu-north-7" in each for each in signed)


def test_authorities_for_s3_alone_hold_for_its_listing_and_bytes_and_nothing_else(
    node: Nodes,
) -> None:
    with Bucket(tls=True) as safe, Origin(tls=True) as other:
        safe.put("m/it", noise(KIB))
        ref = other.add("/it", noise(KIB))
        env = {**KEYS, "AWS_CA_BUNDLE": str(safe.ca_file), "SSL_CERT_FILE": str(other.ca_file)}
        running = node(env=env, s3_endpoint_url=safe.url, s3_region="us-east-1", retries=0)
        for asked, name in (("s3://models/m/", "m"), (ref, "it")):
            running.pull(asked)
            assert running.ready(name).status == 200, running.output
        running = node("another", env={**env, "AWS_CA_BUNDLE": str(other.ca_file)}, s3_endpoint_url=safe.url)
        running.pull("s3://models/m/")
        assert running.ready("m").status == 403


def test_authorities_of_the_environment_are_those_of_s3_too_where_it_has_none(node: Nodes) -> None:
    with Bucket(tls=True) as safe:
        safe.put("m/it", noise(KIB))
        env = {**KEYS, "REQUESTS_CA_BUNDLE": str(safe.ca_file)}
        env |= {"SSL_CERT_FILE": "", "AWS_CA_BUNDLE": "", "AWS_REGION": "us-east-1"}
        running = node(env=env, s3_endpoint_url=safe.url, retries=0)
        running.pull("s3://models/m/")
        assert running.ready("m").status == 200, running.output


# --- unknown variables ---


def test_a_daemon_tells_of_a_variable_that_says_nothing_and_starts(node: Nodes) -> None:
    running = node(env={"CACHD_STREMS": "5"})
    told = running.wait_for("unknown environment variable", level="warning")
    assert told["reason"] == "CACHD_STREMS is no option; did you mean CACHD_STREAMS?"
