"""Which options are in force, who set them, and what the documentation says about them."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from cachd.config import RELOADED_KEYS, Config, load, read, table
from cachd.effective import effective
from cachd.model import SCHEMES
from tests.ground.origin import Origin
from tests.test_config import refused_detail, written


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachd.yaml"


# --- variables of other tools ---


@pytest.mark.parametrize(
    ("key", "variables"),
    {
        "hf_endpoint": ["HF_ENDPOINT"],
        "s3_endpoint_url": ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"],
        "s3_region": ["AWS_REGION", "AWS_DEFAULT_REGION"],
    }.items(),
)
def test_an_option_that_nobody_set_is_that_of_the_ecosystem(
    file: Path, monkeypatch: pytest.MonkeyPatch, key: str, variables: list[str]
) -> None:
    default = getattr(load(), key)
    for number, variable in reversed(list(enumerate(variables))):
        monkeypatch.setenv(variable, f"https://by-variable-{number}")
        assert getattr(load(), key) == f"https://by-variable-{number}"
    assert getattr(load(config=written(file, **{key: "https://by-file"})), key) == "https://by-file"
    for variable in variables:
        monkeypatch.setenv(variable, " ")
    assert getattr(load(), key) == default


def test_endpoints_of_the_environment_are_ignored_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert load().s3_endpoint_url is None


def test_a_file_of_authorities_is_that_of_the_option_then_of_openssl_then_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Origin(tls=True) as origin:
        assert origin.ca_file is not None
        files = [tmp_path / name for name in ("requests.pem", "openssl.pem", "aws.pem", "option.pem")]
        for path in files:
            path.write_bytes(origin.ca_file.read_bytes())
    requests, openssl, aws, option = files
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(requests))
    assert load().ca_file == requests
    monkeypatch.setenv("SSL_CERT_FILE", str(openssl))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(aws))
    assert (load().ca_file, load().s3_ca_file) == (openssl, aws)
    assert (load(ca_file=option).ca_file, load(ca_file=option).s3_ca_file) == (option, aws)


@pytest.mark.parametrize(
    "variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CACHD_CA_FILE"]
)
def test_a_variable_that_names_no_file_of_authorities_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "garbage").write_text("no certificate")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "garbage", tmp_path / "pipe"):
        monkeypatch.setenv(variable, str(path))
        told = refused_detail()
        assert told.startswith(f"{variable}: ")
        assert f"{path} cannot be used" in told


# --- the options in force ---


def test_every_option_in_force_is_told_with_who_gave_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("streams: 5\n\nreserve_free: 20 %\nmodels:\n- ref: hf://a/b\n  pin: yes\n")
    monkeypatch.setenv("CACHD_PULLS", "7")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    found = {each.key: each.as_document() for each in effective(read(config=file, root=tmp_path))}
    assert list(found) == list(Config.model_fields)
    expected = {
        "root": (str(tmp_path), "flag", "--root"),
        "streams": (5, "file", f"{file}:1"),
        "reserve_free": ("20%", "file", f"{file}:3"),
        "models": ([{"ref": "hf://a/b", "pin": True}], "file", f"{file}:4"),
        "pulls": (7, "environment", "CACHD_PULLS"),
        "hf_endpoint": ("https://mirror.example", "ecosystem", "HF_ENDPOINT"),
        "retries": (8, "default", ""),
        "hf_token_file": (None, "default", ""),
    }
    for key, (value, source, where) in expected.items():
        assert found[key] == {"key": key, "value": value, "source": source, "where": where}
    assert json.dumps(list(found.values()))


def test_where_the_hub_token_comes_from_is_told_and_never_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> tuple[object, ...]:
        found = {each.key: each for each in effective(read())}
        assert "canary" not in repr(found)
        return found["hf_token_file"].value, found["hf_token_file"].source.value, found["hf_token_file"].where

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert told() == (None, "default", "")
    (tmp_path / "token").write_text("canary")
    assert told() == ("set", "ecosystem", "hf auth login")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert told() == ("set", "ecosystem", "HF_TOKEN_PATH")
    monkeypatch.setenv("HF_TOKEN", "canary")
    assert told() == ("set", "ecosystem", "HF_TOKEN")
    monkeypatch.setenv("CACHD_HF_TOKEN_FILE", "/run/token")
    assert told() == ("/run/token", "environment", "CACHD_HF_TOKEN_FILE")


def test_a_password_in_a_value_is_not_among_the_options_in_force(file: Path) -> None:
    file.write_text(
        "listen: 'localhost:1'\nroot: /x\nallowed_hosts: ['https://u:canary@h/?t=canary', 'u:canary@h']\n"
    )
    found = {each.key: each.value for each in effective(read(config=file))}
    assert "canary" not in repr(found)
    assert found["allowed_hosts"] == ["https://h/?…", "h"]


# --- the documentation ---


def test_every_option_is_read_by_somebody() -> None:
    """An option that no module reads would be accepted and shown, and have no effect."""
    # The daemon reads these by way of the table of schemes.
    read = {option for scheme in SCHEMES.values() for option in (*scheme.columns.values(), scheme.ca_file)}
    for module in (Path(__file__).parent.parent / "cachd").rglob("*.py"):
        whose = ("self", "config") if module.parent.name == "config" else ("config",)
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner)) if owner in whose:
                    read.add(node.attr)
    assert set(Config.model_fields) - read == set()


def test_every_option_has_its_line_in_the_table() -> None:
    rows = list(table())
    assert [name for name, *_ in rows] == list(Config.model_fields)
    assert all(variable == f"CACHD_{name.upper()}" for name, variable, *_ in rows)
    assert all(meaning for *_, meaning in rows)


def test_the_help_of_an_option_says_whether_it_is_taken_over_while_the_daemon_runs() -> None:
    said = {name for name, *_, text in table() if "reloaded when the file changes" in text}
    assert said == RELOADED_KEYS


def test_the_default_of_the_table_is_a_value_the_option_takes(file: Path) -> None:
    defaults = {name: default for name, _, default, _ in table() if default}
    file.write_text("".join(f"{name}: {default}\n" for name, default in defaults.items()))
    assert load(config=file) == load().model_copy(update={"config": file})
