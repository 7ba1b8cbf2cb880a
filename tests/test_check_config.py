"""`cachd check-config`: all that is wrong with a file at once, with file, line and key, without a daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.ground.program import CACHD, run

PATIENCE_SECONDS = 120


def checked(file: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*CACHD, "check-config", str(file), *words]
    return run(command, env={**os.environ, **env}, timeout=PATIENCE_SECONDS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_a_right_file_ends_with_exit_code_0(file: Path) -> None:
    file.write_text("streams: 4\nmodels:\n  - ref: hf://org/model\n")
    ended = checked(file)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{file}: ok\n", "")
    document = json.loads(checked(file, "-o", "json").stdout)
    assert (document["ok"], document["findings"], document["more"]) == (True, [], 0)


def test_everything_wrong_is_told_at_once_with_file_line_and_key(file: Path) -> None:
    """Wrong values, an unknown key, a double name, a missing file, and what only the start would refuse."""
    file.write_text(
        "streams: many\n"
        "models:\n"
        "  - {ref: 'hf://org/model', name: m}\n"
        "  - {ref: 'hf://org/other', name: m}\n"
        "steams: 4\n"
        "ca_file: /nonexistent/ca.pem\n"
        "listen: 0.0.0.0:8470\n"
        "tls_cert_file: /nonexistent/tls.pem\n"
        "hf_endpoint: huggingface.co\n"
    )
    ended = checked(file)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [": ".join(line.split(": ")[:2]) for line in ended.stdout.splitlines()] == [
        f"{file}:1: streams",
        f"{file}:4: models[1]",
        f"{file}:5: steams",
        f"{file}:6: ca_file",
        f"{file}:7: listen",
        f"{file}:8: tls_cert_file",
        f"{file}:9: hf_endpoint",
    ]
    assert "'many' is not a whole number from 1 to 256" in ended.stdout
    assert "did you mean streams?" in ended.stdout
    assert "would let anybody on the network pull and delete models" in ended.stdout


def test_a_value_that_makes_a_default_wrong_is_told(file: Path) -> None:
    file.write_text("high_watermark: 97%\nstreams: many\n")
    ended = checked(file)
    assert ended.returncode == 1
    assert "low_watermark: 98% is above high_watermark, 97%" in ended.stdout
    assert f"{file}:2: streams: 'many' is not a whole number" in ended.stdout


def test_models_that_could_never_be_pulled_are_wrong(file: Path) -> None:
    file.write_text(
        "models:\n"
        "  - ref: http://host/it.bin\n"
        "  - ref: hf://refused/model\n"
        "  - ref: file:///elsewhere/it\n"
        "  - ref: file:///share/it\n"
        "allow: ['file:///share/']\n"
        "sources:\n"
        "  - {prefix: 'hf://refused/', refuse: true}\n"
    )
    document = json.loads(checked(file, "-o", "json").stdout)
    assert [(each["line"], each["key"]) for each in document["findings"]] == [
        (2, "models[0].ref"),
        (3, "models[1].ref"),
        (4, "models[2].ref"),
    ]
    assert all("(" in each["reason"] for each in document["findings"]), "with what to do"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: [\n", 2, "not YAML"),
        ("- a\n", 1, "has no keys"),
        ("a:\n\tb: 1\n", 2, "a tab"),
        ("streams: \x01\n", 1, "a control character"),
        (None, None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_finding_too(
    file: Path, text: str | None, line: int | None, reason: str
) -> None:
    if text is not None:
        file.write_text(text)
    ended = checked(file, "-o", "json")
    (found,) = json.loads(ended.stdout)["findings"]
    assert (ended.returncode, found["line"], found["key"]) == (1, line, None)
    assert found["where"] == (f"{file}:{line}" if line else str(file))
    assert reason in found["reason"]
    assert str(file) not in found["reason"]


def test_the_variables_of_the_daemon_count_too(file: Path) -> None:
    file.write_text("streams: 4\n")
    ended = checked(file, CACHD_PULLS="0", CACHD_PROXY="socks5://proxy")
    assert ended.returncode == 1
    assert "CACHD_PULLS: pulls: '0' is not a whole number from 1 to 256" in ended.stdout
    assert "CACHD_PROXY: proxy: cachd supports http:// and https:// proxies only" in ended.stdout
    proxies = checked(file, CACHD_PROXY="env", HTTPS_PROXY="socks5://proxy")
    assert (proxies.returncode, "HTTPS_PROXY names no proxy" in proxies.stdout) == (1, True)
    unknown = checked(file, CACHD_STREEMS="4")
    assert unknown.returncode == 0
    assert "warning: CACHD_STREEMS is no option; did you mean CACHD_STREAMS?" in unknown.stderr


def test_no_secret_of_a_file_is_shown(file: Path) -> None:
    file.write_text("proxy: http://user:canary@proxy:3128\nhf_endpoint: https://user:canary@host\n")
    ended = checked(file)
    assert ended.returncode == 1
    assert len(ended.stdout.splitlines()) == 2
    assert "canary" not in ended.stdout + ended.stderr


CONFIGMAP = Path(__file__).parent.parent / "daemonset/configmap.yaml"
ELSEWHERE = """
tls_cert_file: /etc/cachd/tls/tls.crt
tls_key_file: /etc/cachd/tls/tls.key
ca_file: /etc/corp/ca.pem
s3_ca_file: /etc/corp/s3.pem
hf_token_file: /etc/cachd/secrets/hf-token
proxy: http://proxy.corp:3128
proxy_credentials_file: /etc/cachd/secrets/proxy-credentials
"""


@pytest.fixture
def configmap(tmp_path: Path) -> Path:
    """The shipped ConfigMap as the kubelet mounts it, read-only. Nothing else that it names is here."""
    mounted = tmp_path / "etc-cachd"
    (mounted / "..data-1").mkdir(parents=True)
    (mounted / "..data").symlink_to("..data-1")
    file = mounted / "config.yaml"
    file.symlink_to("..data/config.yaml")
    content = yaml.safe_load(CONFIGMAP.read_text())["data"]["config.yaml"]
    (mounted / "..data-1/config.yaml").write_text(content)
    return file


def confined(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Check it as the init container does: no home, no root of the cache, an environment of its own."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "CACHD_CONFIG": str(file)}
    return run([*CACHD, "check-config", *words], env=env, timeout=PATIENCE_SECONDS)


def test_an_init_container_checks_the_configmap_without_root_token_or_secret(configmap: Path) -> None:
    root = Path(yaml.safe_load(configmap.read_text())["root"])
    was_there = root.exists()
    ended = confined(configmap)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{configmap}: ok\n", "")
    assert root.exists() == was_there, "it makes no root"


def test_an_init_container_ends_with_1_and_says_what_is_wrong_with_the_configmap(configmap: Path) -> None:
    configmap.write_text(configmap.read_text().replace("models:", "modles:"))
    ended = confined(configmap, "--no-files")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert re.fullmatch(rf"{configmap}:\d+: modles: .*did you mean models\?.*\n", ended.stdout)


def test_certificates_that_are_not_mounted_are_not_asked_for_without_files(configmap: Path) -> None:
    configmap.write_text(configmap.read_text() + ELSEWHERE)
    strict = confined(configmap)
    assert strict.returncode == 1
    assert [line.split(": ")[1] for line in strict.stdout.splitlines()] == [
        "tls_cert_file",
        "ca_file",
        "s3_ca_file",
    ]
    assert confined(configmap, "--no-files").returncode == 0
