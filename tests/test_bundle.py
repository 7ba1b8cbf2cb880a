"""The archive for a bug report has what is needed, and no secret."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.cli.bundle import bundle, redacted
from cachd.errors import Invalid
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.program import CACHD, run
from tests.ground.site import PATIENCE_SECONDS, Ground

Nodes = Callable[..., Node]


def texts(archive: Path | bytes) -> dict[str, str]:
    opened = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
    with opened, tarfile.open(fileobj=opened) as packed:
        return {
            member.name.removeprefix("cachd-bundle/"): content.read().decode()
            for member in packed.getmembers()
            if (content := packed.extractfile(member))
        }


def test_a_bundle_has_what_a_report_needs_and_no_secret(origin: Origin, node: Nodes, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary-bearer")
    (tmp_path / "proxy").write_text("user:canary-proxy")
    running = node(
        token_file=str(tmp_path / "token"),
        proxy="http://127.0.0.1:1",
        no_proxy="127.0.0.1",
        proxy_credentials_file=str(tmp_path / "proxy"),
    )
    auth = {"Authorization": "Bearer canary-bearer"}
    asked = {"ref": origin.add("/it.bin", noise(1000)), "name": "it.bin"}
    assert running.ask("POST", "/v1/models", asked, headers=auth).status == 202
    assert running.ready("it.bin").status == 200
    log = tmp_path / "log"
    log.write_text(
        "x" * (9 << 20) + "\nGET https://user:canary-url@host/x?X-Amz-Signature=canary-query HTTP/1.1\n"
    )
    file = tmp_path / "report.tar.gz"
    ended = running.cli("bundle", str(file), "--log", str(log), CACHD_TOKEN="canary-bearer")
    assert (ended.returncode, ended.stdout) == (0, f"{file}\n"), ended.stderr
    found = texts(file)
    assert [model["name"] for model in json.loads(found["models.json"])] == ["it.bin"]
    options = {o["key"]: o["value"] for o in json.loads(found["options.json"])["options"]}
    assert options["token_file"] == str(tmp_path / "token")
    assert "cachd_pulls_in_progress" in found["metrics.txt"]
    assert "findings" in json.loads(found["doctor.json"])
    assert json.loads(found["bundle.json"])["cachd"]
    assert {"capacity.json", "evictions.json", "limits.json", "scrubs.json", "sources.json"} <= found.keys()
    assert found["log.txt"].endswith("GET https://[removed]host/x?[removed] HTTP/1.1\n")
    assert len(found["log.txt"]) <= 8 << 20
    assert "canary" not in "".join(found.values())


def test_a_bundle_goes_to_standard_output_too(ground: Ground) -> None:
    """As `kubectl exec ds/cachd -- cachd bundle - > report.tar.gz`: the pod's file system is read-only."""
    env = {**os.environ, "CACHD_URL": ground.node.url}
    command = [*CACHD, "bundle", "-"]
    ended = subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE_SECONDS)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert json.loads(texts(ended.stdout)["livez.json"]) == {"status": "alive"}


def test_a_bundle_is_made_without_a_daemon_and_without_an_admins_token(node: Nodes, tmp_path: Path) -> None:
    down = run(
        [*CACHD, "bundle", str(tmp_path / "down.tar.gz")],
        env={**os.environ, "CACHD_URL": "http://127.0.0.1:1"},
        timeout=PATIENCE_SECONDS,
    )
    assert down.returncode == 0, down.stderr
    found = texts(tmp_path / "down.tar.gz")
    assert json.loads(found["unreachable.json"])["code"] == "daemon_unreachable"
    (tmp_path / "token").write_text("canary-bearer")
    running = node(token_file=str(tmp_path / "token"))
    assert running.cli("bundle", str(tmp_path / "anybody.tar.gz")).returncode == 0
    found = texts(tmp_path / "anybody.tar.gz")
    assert json.loads(found["options.json"])["code"] == "unauthorized"
    assert json.loads(found["models.json"]) == []
    refused = running.cli("bundle", str(tmp_path / "absent/x.tar.gz"))
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("proxy http://user:pass@host:1/x", "proxy http://[removed]host:1/x"),
        ("s3://b/k?X-Amz-Credential=AKIAABCDEFGHIJKLMNOP&x=1 y", "s3://b/k?[removed] y"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer [removed]"),
        ("hf_abcdefghijklmnopqrstuvwxyzABCDEF", "[removed]"),
        ('"aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG"', '"aws_secret_access_key": "[removed]"'),
        ("token: s3cr3t", "token: [removed]"),
        ("hf_token_file: /etc/cachd/hf-token", "hf_token_file: /etc/cachd/hf-token"),
        ("hf_endpoint https://huggingface.co", "hf_endpoint https://huggingface.co"),
        ("sha256:9f86d081884c7d659a2feaa0c55ad015", "sha256:9f86d081884c7d659a2feaa0c55ad015"),
    ],
)
def test_what_may_be_a_secret_is_removed_wherever_it_stands(text: str, left: str) -> None:
    assert redacted(text) == left


def test_a_log_that_cannot_be_read_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"none\.log cannot be read") as error:
        bundle(tmp_path / "report.tar.gz", log=tmp_path / "none.log", server="http://127.0.0.1:1")
    assert error.value.code == "bad_file"
    assert not list(tmp_path.iterdir())
