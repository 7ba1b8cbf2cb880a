"""Secrets are read again at every use, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.sources.failures import bare
from cachd.sources.http import Target
from cachd.sources.secrets import Secret, Secrets
from tests.fetching import refused


@pytest.mark.parametrize(
    ("content", "token"),
    [("hf_abc", "hf_abc"), ("hf_abc\n", "hf_abc"), ("  hf_abc \r\n", "hf_abc"), ("", None), (" \n", None)],
)
def test_a_token_is_what_its_file_holds_without_space_around(
    tmp_path: Path, content: str, token: str | None
) -> None:
    (tmp_path / "token").write_bytes(content.encode())
    assert Secret(tmp_path / "token").read() == token


@pytest.mark.parametrize(
    "content",
    [b"canary\r\nX-Evil: 1", b"canary\nb", b"can ary", b"can\0ary", b"can\x7fary", "canäry".encode()],
)
def test_a_token_no_header_can_carry_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    refusal = refused(Secret(tmp_path / "token").read, "bad_secret")
    assert "can" not in str(refusal).replace("cannot", "").replace(str(tmp_path), "")


def test_a_secret_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary"):
        error = refused(Secret(path).read, "bad_secret")
        assert error.withheld["secret"] == str(path)
        assert str(path) not in str(error.as_document())


def test_a_token_is_read_again_at_every_use(tmp_path: Path) -> None:
    file = tmp_path / "token"
    secret = Secret(file)
    refused(secret.read, "bad_secret")
    for token in ("first", "second"):
        file.write_text(token)
        assert secret.read() == token


def test_the_environment_holds_the_token_where_no_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_A_TEST", " from-environment\n")
    (tmp_path / "token").write_text("from-file")
    assert Secret(None, "TOKEN_OF_A_TEST").read() == "from-environment"
    assert Secret(tmp_path / "token", "TOKEN_OF_A_TEST").read() == "from-file"
    monkeypatch.delenv("TOKEN_OF_A_TEST")
    assert Secret(None, "TOKEN_OF_A_TEST").read() is None
    assert Secret(None).read() is None


def test_nothing_shows_a_secret_by_accident(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary")
    secret = Secret(tmp_path / "token")
    secret.read()
    target = Target("https://host/x", 1, Secrets({"Authorization": "Bearer canary"}, "sig=canary"))
    assert "canary" not in repr(secret) + str(vars(secret)) + repr(target)
    assert bare("https://user:canary@host/x?sig=canary#canary") == "https://host/x"
