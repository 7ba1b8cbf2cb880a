"""Secrets are read again at every use, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.sources.failures import bare
from cachd.sources.http import Target
from cachd.sources.secrets import GivenSecret, HubToken, Place, Secret, Secrets, is_true
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
    reasons = {"absent": "No such file or directory", "": "not a regular file", "binary": "not text"}
    for name, reason in reasons.items():
        path = tmp_path / name
        error = refused(Secret(path).read, "bad_secret")
        assert error.detail.endswith(f": {reason}")
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


def test_what_a_caller_sent_is_in_no_file() -> None:
    assert (GivenSecret(" x ").read(), GivenSecret("").read(), GivenSecret("x").where) == ("x", None, "")


@pytest.mark.parametrize(
    ("content", "pair"),
    [("user:word\n", "user:word"), (":", ":"), ("a:b c:d", "a:b c:d"), ("", None), (" \n", None)],
)
def test_a_user_and_a_password_are_read_as_one_text(tmp_path: Path, content: str, pair: str | None) -> None:
    (tmp_path / "pair").write_text(content)
    assert Secret(tmp_path / "pair").user_and_password() == pair


@pytest.mark.parametrize("content", ["canary", "user:can\0ary", "user:can\nary"])
def test_what_is_no_user_and_password_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    (tmp_path / "pair").write_text(content)
    error = refused(Secret(tmp_path / "pair").user_and_password, "bad_secret")
    assert "ary" not in str(error).replace(str(tmp_path), "")
    assert error.withheld["secret"] == str(tmp_path / "pair")


def test_a_secret_says_where_it_is_read_from(tmp_path: Path) -> None:
    assert Secret(tmp_path, "X").where == str(tmp_path)
    assert (Secret(None, "X").where, Secret(None).where) == ("X", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), (" on ", True), ("Yes", True), ("true", True), ("0", False), ("", False), ("2", False)],
)
def test_a_variable_is_true_as_huggingface_hub_reads_it(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    monkeypatch.setenv("OF_A_TEST", text)
    assert is_true("OF_A_TEST") is expected
    monkeypatch.delenv("OF_A_TEST")
    assert is_true("OF_A_TEST") is False


# The variables, and where the token is: a variable, or a file below the test's directory, `{}`.
PLACES: list[tuple[dict[str, str], Place, str]] = [
    ({"HF_TOKEN": "t"}, Place("HF_TOKEN"), "HF_TOKEN"),
    (
        {"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": "t"},
        Place("HUGGING_FACE_HUB_TOKEN"),
        "HUGGING_FACE_HUB_TOKEN",
    ),
    ({"HF_TOKEN": "t", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, Place(), ""),
    ({"HF_TOKEN_PATH": "{}/named"}, Place("HF_TOKEN_PATH", Path("{}/named")), "{}/named (HF_TOKEN_PATH)"),
    ({"HF_HOME": "{}/home"}, Place(file=Path("{}/home/token")), "{}/home/token"),
    ({"XDG_CACHE_HOME": "{}/x"}, Place(file=Path("{}/x/huggingface/token")), "{}/x/huggingface/token"),
    ({"HOME": "{}"}, Place(file=Path("{}/.cache/huggingface/token")), "{}/.cache/huggingface/token"),
    ({"HF_HOME": "~nobody-of-this-name/x"}, Place(), ""),
]


@pytest.mark.parametrize(("variables", "place", "where"), PLACES)
def test_the_token_of_the_hub_is_where_huggingface_hub_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: Place, where: str
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    file = Path(str(place.file).format(tmp_path)) if place.file else None
    token = HubToken(None)
    assert token.place() == Place(place.variable, file)
    assert token.where == where.format(tmp_path)
    own = HubToken(tmp_path / "own")
    assert (own.place(), own.where) == (Place(file=tmp_path / "own"), str(tmp_path / "own"))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("in the file"[-4:] + "\n")
        assert token.read() == "file"
    else:
        assert token.read() == ("t" if place.variable else None)


@pytest.mark.parametrize(
    ("content", "reasons"),
    [(None, []), (b"\xff\xfe", ["not text"]), (b"two words", ["a secret of the daemon holds characters"])],
)
def test_a_login_that_cannot_be_read_is_no_token_and_a_named_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reasons: list[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    token = HubToken(None)
    with capture_logs() as logs:
        assert [token.read() for _ in range(2)] == [None, None]
    assert [each["reason"][: len(reason)] for each, reason in zip(logs, reasons, strict=True)] == reasons
    error = refused(HubToken(tmp_path / "token").read, "bad_secret")
    assert error.withheld["secret"] == str(tmp_path / "token")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    error = refused(HubToken(None).read, "bad_secret")
    assert error.withheld["secret"] == f"{tmp_path / 'token'} (HF_TOKEN_PATH)"
