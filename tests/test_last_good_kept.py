"""When the last good configuration is kept and used, decided in this process over a real root."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cachd.config import Loaded, read
from cachd.daemon.last_good import keep, read_or_last_good
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout

RIGHT = "streams: 3\nallow: ['https://origin.example/']\n"
WRONG = "streams: many\n"


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


@pytest.fixture
def file(tmp_path: Path, root: Path) -> Path:
    """A configuration file that is right; its configuration was kept in the root."""
    made = tmp_path / "cachd.yaml"
    made.write_text(RIGHT)
    with DiskStore(root):
        pass
    keep(read(config=made, root=root), Layout(root))
    return made


def kept(root: Path) -> Path:
    return Layout(root).last_good


def started(file: Path, root: Path, **flags: object) -> Loaded:
    return read_or_last_good(config=file, root=root, **flags)


def refused(file: Path, root: Path | None, **flags: object) -> CachdError:
    with pytest.raises((Invalid, Forbidden)) as refusal:
        read_or_last_good(config=file, root=root, **flags)
    return refusal.value


def test_what_is_kept_is_what_the_file_set_and_what_protects_from_outside(file: Path, root: Path) -> None:
    assert json.loads(kept(root).read_text()) == {
        "keys": {"streams": "3", "allow": ["https://origin.example/"]},
        "outside": {},
    }
    assert stat.S_IMODE(kept(root).stat().st_mode) == 0o600
    before = kept(root).stat().st_ino
    keep(read(config=file, root=root), Layout(root))
    assert kept(root).stat().st_ino == before, "the same is not written again"
    keep(read(config=file, root=root, anonymous_reads=False, token_file="/t", pulls=9), Layout(root))
    assert json.loads(kept(root).read_text())["outside"] == {"anonymous_reads": "False", "token_file": "/t"}


def test_a_right_file_is_used_itself(file: Path, root: Path) -> None:
    file.write_text("streams: 5\n")
    loaded = started(file, root)
    assert (loaded.config.streams, loaded.last_good) == (5, None)


@pytest.mark.parametrize("text", [WRONG, "streams: [\n", "listen: 0.0.0.0:1\n", None])
def test_in_place_of_a_wrong_file_the_last_good_configuration_is_used(
    file: Path, root: Path, text: str | None
) -> None:
    os.utime(kept(root), (1000, 1000))
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    loaded = started(file, root, pulls=7)
    assert loaded.last_good is not None
    assert (loaded.config.streams, loaded.config.pulls) == (3, 7)
    assert loaded.config.allow == ("https://origin.example/",)
    assert loaded.last_good.kept_at == 1000
    assert loaded.last_good.fault.code in ("bad_option", "bad_config", "open_writes")
    assert loaded.content == (text or "").encode()
    assert loaded.place("streams") == str(kept(root)) or str(kept(root)) in loaded.place("streams")


def test_it_is_not_used_if_what_protects_from_outside_is_not_as_it_was(file: Path, root: Path) -> None:
    flags = {"token_file": "/t", "anonymous_reads": False}
    keep(read(config=file, root=root, **flags), Layout(root))
    file.write_text(WRONG)
    assert started(file, root, **flags).config.streams == 3
    assert started(file, root, **flags, pulls=7).config.pulls == 7, "pulls protect nothing"
    assert refused(file, root).code == "bad_option"
    assert refused(file, root, token_file="/other", anonymous_reads=False).code == "bad_option"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"keys": {}}', '{"keys": 5, "outside": {}}'])
def test_what_cachd_did_not_write_is_not_used(file: Path, root: Path, content: str) -> None:
    kept(root).write_text(content)
    file.write_text(WRONG)
    assert refused(file, root).code == "bad_option"


def test_without_a_kept_configuration_a_wrong_file_is_refused(file: Path, root: Path) -> None:
    kept(root).unlink()
    file.write_text(WRONG)
    assert "streams" in refused(file, root).detail


def test_the_configuration_of_another_root_is_not_used(file: Path, root: Path, tmp_path: Path) -> None:
    keep(read(config=_with(file, f"root: {tmp_path}/other\n")), Layout(root))
    file.write_text(f"root: {root}\n{WRONG}")
    assert refused(file, None).code == "bad_option"


def _with(file: Path, more: str) -> Path:
    file.write_text(RIGHT + more)
    return file


def test_a_wrong_file_still_names_the_root(file: Path, root: Path) -> None:
    keep(read(config=_with(file, f"root: {root}\n")), Layout(root))
    file.write_text(f"root: {root}\n{WRONG}")
    assert read_or_last_good(config=file).config.streams == 3


def test_a_root_that_others_may_write_to_is_not_trusted(file: Path, root: Path) -> None:
    file.write_text(WRONG)
    root.chmod(0o777)
    assert refused(file, root).code == "bad_option"
    root.chmod(0o755)
    root.parent.chmod(0o777)
    assert refused(file, root).code == "bad_option"
    root.parent.chmod(0o755)
    assert started(file, root).config.streams == 3


def test_who_named_no_root_is_told_to_name_it(file: Path) -> None:
    file.write_text("streams: [\n")
    refusal = refused(file, None)
    assert refusal.code == "bad_config"
    assert "--root or CACHD_ROOT" in refusal.hint
    file.write_text(WRONG)
    assert "--root or CACHD_ROOT" not in (refused(file, None).hint or "")
