"""The file or directory of tokens: what it may hold, how it rotates, and what is never said of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cachd.errors import Unauthorized
from cachd.policy.roles import Grant, Namespaces, Role
from cachd.settings.tokens import TokenFile

SECRET = "canary-0123456789abcdef"
TEAM = Grant("team-a", Role.pull, Namespaces(("team-a-*", "hf://Qwen/")))


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def known(path: Path, token: str = SECRET) -> Grant | None:
    return TokenFile(path).grant_of(token.encode())


def written(path: Path, said: object) -> Path:
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    return path


def listed(**said: object) -> dict[str, list[Any]]:
    return {"tokens": [{"name": "team-a", "role": "pull", "token": SECRET, **said}]}


# --- one file ---


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f"  {SECRET} \r\n", f"sha256:{sha256(SECRET)}"])
def test_a_file_with_one_token_is_an_admin_s(tmp_path: Path, text: str) -> None:
    file = written(tmp_path / "token", text)
    assert known(file) == Grant("admin", Role.admin, Namespaces())
    for other in ("", " ", SECRET[:-1], f"{SECRET}x", SECRET.upper(), text.strip() + "x"):
        assert known(file, other) is None


@pytest.mark.parametrize("token", ["a b c", "caf\u00e9", "k:v", "*star", "'quoted", "@at", "#xy"])
def test_a_token_of_odd_characters_goes_on_to_work(tmp_path: Path, token: str) -> None:
    assert known(written(tmp_path / "token", token), token) == Grant("admin", Role.admin)


YAML = f"""
tokens:
  - name: team-a
    role: pull
    namespaces: ["team-a-*", "hf://Qwen/"]
    token: {SECRET}
  - {{name: grafana, role: read, sha256: {sha256("other")}}}
"""


def test_a_list_gives_each_token_a_name_a_role_and_namespaces(tmp_path: Path) -> None:
    file = written(tmp_path / "tokens", YAML)
    assert known(file) == TEAM
    assert known(file, "other") == Grant("grafana", Role.read, Namespaces())
    assert known(file, sha256("other")) is None, "a hash is no token"
    assert known(file, f"sha256:{sha256('other')}") is None
    as_json = written(tmp_path / "json", listed(namespaces=["team-a-*", "hf://Qwen/"]))
    assert known(as_json) == TEAM
    assert known(written(tmp_path / "commas", listed(namespaces="team-a-*, hf://Qwen/"))) == TEAM
    assert known(written(tmp_path / "bare", json.dumps(listed()["tokens"]))) == Grant("team-a", Role.pull)


WRONG: dict[str, object] = {
    "no YAML": "tokens: [",
    "two lines": f"{SECRET}\n{SECRET}",
    "no list": {"tokens": {"name": "a"}},
    "another key": {"token": SECRET},
    "a key beside": {**listed(), "role": "admin"},
    "no mapping": {"tokens": [SECRET]},
    "no name": {"tokens": [{"role": "pull", "token": SECRET}]},
    "a name that is none": listed(name="a b"),
    "a name that is taken": listed(name="anonymous"),
    "no role": {"tokens": [{"name": "a", "token": SECRET}]},
    "a role that is none": listed(role="owner"),
    "a role that is a list": listed(role=["admin"]),
    "no token": {"tokens": [{"name": "a", "role": "pull"}]},
    "an empty token": listed(token=" "),
    "a token that is a list": listed(token=[SECRET]),
    "both": listed(sha256=sha256(SECRET)),
    "a short hash": {"tokens": [{"name": "a", "role": "pull", "sha256": "abc"}]},
    "a secret in place of the namespaces": listed(namespaces=f"{SECRET}!"),
    "no namespaces": listed(namespaces=[]),
    "a list of lists": listed(namespaces=[["*"]]),
    "namespaces that are nothing": listed(namespaces=None),
    "a key that is none": listed(**{SECRET: "x"}),
    "a name twice": {"tokens": [*listed()["tokens"], *listed(token="other")["tokens"]]},
    "a token twice": {"tokens": [*listed()["tokens"], *listed(name="other")["tokens"]]},
    "too many": {"tokens": listed()["tokens"] * 1001},
    "too long": "x" * (300 << 10),
    "an alias bomb": "a: &a [x,x]\nb: &b [*a,*a]\ntokens: [*b,*b]",
    "a deep one": "[" * 1200,
}


@pytest.mark.parametrize("said", WRONG.values(), ids=WRONG)
def test_a_broken_file_keeps_the_tokens_that_were_good_and_says_so_once_without_a_secret(
    tmp_path: Path, said: object
) -> None:
    file = written(tmp_path / "tokens", YAML)
    tokens = TokenFile(file)
    assert tokens.grant_of(SECRET.encode()) == TEAM
    assert tokens.are_in_force()
    written(file, said)
    with capture_logs() as logs:
        for _ in range(3):
            assert tokens.grant_of(SECRET.encode()) == TEAM
            assert tokens.grant_of(b"nobody's") is None
    assert not tokens.are_in_force()
    assert [(log["event"].split(":")[0], log["path"]) for log in logs] == [
        ("tokens not taken over", str(file))
    ]
    assert logs[0]["reason"]
    assert SECRET not in repr(logs) + repr(vars(tokens)) + repr(logs).upper()
    written(file, "another")
    assert tokens.grant_of(b"another") is not None
    assert tokens.grant_of(SECRET.encode()) is None
    assert tokens.are_in_force()


@pytest.mark.parametrize("said", WRONG.values(), ids=WRONG)
def test_a_file_that_was_never_good_lets_nobody_in(tmp_path: Path, said: object) -> None:
    file = written(tmp_path / "tokens", said)
    for guess in (SECRET, str(said), file.read_text().strip(), "None", "null", "[]"):
        with pytest.raises(Unauthorized) as refusal:
            TokenFile(file).grant_of(guess.encode())
        assert refusal.value.code == "token_unreadable"


def test_a_file_that_is_gone_or_empty_takes_its_tokens_away(tmp_path: Path) -> None:
    file = written(tmp_path / "token", SECRET)
    tokens = TokenFile(file)
    assert tokens.grant_of(SECRET.encode())
    written(file, " \n")
    for given in (SECRET, "", " "):
        assert tokens.grant_of(given.encode()) is None
    written(file, SECRET)
    assert tokens.grant_of(SECRET.encode())
    file.unlink()
    with pytest.raises(Unauthorized) as refusal:
        tokens.grant_of(SECRET.encode())
    assert refusal.value.code == "token_unreadable"
    assert str(tmp_path) not in str(refusal.value.as_document())


def test_what_is_no_file_is_refused_at_once_and_a_long_one_unread(tmp_path: Path) -> None:
    """A pipe would keep every write waiting, a device would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Unauthorized):
            TokenFile(path).grant_of(SECRET.encode())
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(8 << 30)
    with pytest.raises(Unauthorized):
        TokenFile(tmp_path / "sparse").grant_of(SECRET.encode())


def test_no_plain_token_stays_in_memory(tmp_path: Path) -> None:
    tokens = TokenFile(written(tmp_path / "tokens", YAML))
    assert tokens.grant_of(SECRET.encode()) == TEAM
    held = repr([vars(tokens), *(entry.tokens for entry in tokens._entries.values())])
    assert "team-a" in held
    assert SECRET not in held
    assert sha256(SECRET) not in held


@hypothesis.given(st.binary(max_size=200))
def test_any_content_of_a_token_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("any") / "tokens"
    file.write_bytes(content)
    try:
        grant = TokenFile(file).grant_of(content.strip())
    except Unauthorized:
        return
    assert grant is None or content.strip()


# --- a directory, as a Secret is mounted ---


class Mounted:
    """A Secret as the kubelet mounts it: files are links to ..data/FILE, and that changes by one rename."""

    def __init__(self, place: Path) -> None:
        self.place, self._versions = place, 0
        place.mkdir()

    def put(self, **contents: str) -> None:
        self._versions += 1
        version = self.place / f"..2026_{self._versions}"
        version.mkdir()
        for name, content in contents.items():
            (version / name).write_text(content)
        (self.place / "..data_tmp").symlink_to(version.name)
        (self.place / "..data_tmp").rename(self.place / "..data")
        for name in contents:
            if not (self.place / name).is_symlink():
                (self.place / name).symlink_to(f"..data/{name}")
        for link in self.place.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()


PULL = "role: pull\nnamespaces: ['team-a-*', 'hf://Qwen/']\ntoken: "


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    return Mounted(tmp_path / "tokens")


def test_each_file_of_a_mounted_secret_is_a_token_named_after_it(mounted: Mounted) -> None:
    mounted.put(**{"team-a": PULL + SECRET, "ops": "{role: admin, token: other}"})
    assert known(mounted.place) == TEAM
    assert known(mounted.place, "other") == Grant("ops", Role.admin)


def test_a_mounted_secret_rotates_and_its_tokens_come_and_go(mounted: Mounted) -> None:
    mounted.put(**{"team-a": PULL + SECRET})
    tokens = TokenFile(mounted.place)
    assert tokens.grant_of(SECRET.encode()) == TEAM
    mounted.put(**{"team-a": PULL + "new", "ops": "{role: admin, token: other}"})
    assert tokens.grant_of(SECRET.encode()) is None
    assert tokens.grant_of(b"new") == TEAM
    assert tokens.grant_of(b"other") == Grant("ops", Role.admin)
    mounted.put(ops="{role: admin, token: other}")
    assert tokens.grant_of(b"new") is None


def test_a_broken_file_of_a_directory_holds_up_no_other(mounted: Mounted) -> None:
    mounted.put(**{"team-a": PULL + SECRET, "ops": "{role: admin, token: other}"})
    tokens = TokenFile(mounted.place)
    assert tokens.grant_of(b"other")
    for broken in (
        "role: [",
        SECRET,
        "role: pull",
        f"name: x\nrole: pull\ntoken: {SECRET}",
        "x" * (300 << 10),
    ):
        with capture_logs() as logs:
            mounted.put(**{"team-a": broken, "ops": "{role: admin, token: newer}"})
            assert tokens.grant_of(SECRET.encode()) == TEAM
            assert tokens.grant_of(b"other") is None
            assert tokens.grant_of(b"newer") is not None
        assert [log["kept"] for log in logs] == [["team-a"]]
        assert SECRET not in repr(logs)
        mounted.put(**{"team-a": PULL + SECRET, "ops": "{role: admin, token: other}"})
        assert tokens.grant_of(b"other")


def test_a_plain_directory_is_read_like_a_mounted_one(tmp_path: Path) -> None:
    (tmp_path / "team-a").write_text(PULL + SECRET)
    (tmp_path / ".hidden").write_text("{role: admin, token: hidden}")
    (tmp_path / "empty").write_text("")
    tokens = TokenFile(tmp_path)
    assert tokens.grant_of(SECRET.encode()) == TEAM
    assert tokens.grant_of(b"hidden") is None
    (tmp_path / "team-a").unlink()
    assert tokens.grant_of(SECRET.encode()) is None
    assert tokens.are_in_force()


def test_a_directory_of_too_many_files_keeps_the_tokens_that_were_good(tmp_path: Path) -> None:
    (tmp_path / "team-a").write_text(PULL + SECRET)
    tokens = TokenFile(tmp_path)
    assert tokens.grant_of(SECRET.encode()) == TEAM
    for number in range(1001):
        (tmp_path / f"t{number}").touch()
    assert tokens.grant_of(SECRET.encode()) == TEAM
    assert not tokens.are_in_force()
