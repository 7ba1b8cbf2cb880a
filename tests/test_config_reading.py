"""How options are read: from where, again, in part, and as far as they are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.config.faults import MAX_FINDINGS
from cachd.config.reading import LastGood, Loaded, examine, load, path_of_file, read, read_kept
from cachd.errors import Invalid
from cachd.model import Percentage
from cachd.settings.file import ConfigFile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "cachd.yaml"
    made.write_text("streams: 3\nallow:\n- 10.0.0.0/8\n")
    return made


def test_options_know_their_file_and_the_place_of_each_value(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHD_RETRIES", "2")
    loaded = read(config=file, pulls=5, queued_pulls=None)
    assert loaded.content == file.read_bytes()
    assert read().content == b""
    assert [loaded.place(*loc) for loc in (("streams",), ("allow", 0), ("retries",), ("pulls",))] == [
        f"{file}:1",
        f"{file}:3",
        "CACHD_RETRIES",
        "--pulls",
    ]
    assert loaded.place("queued_pulls") == ""
    assert (loaded.config.streams, loaded.config.retries, loaded.config.pulls) == (3, 2, 5)
    assert "queued_pulls" not in loaded.flags
    assert load(config=file) == read(config=file).config


def test_the_file_is_named_by_the_flag_or_else_by_the_variable(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert path_of_file({}) is None
    monkeypatch.setenv("CACHD_CONFIG", "here.yaml")
    assert path_of_file({}) == Path.cwd() / "here.yaml"
    assert path_of_file({"config": file}) == file
    monkeypatch.setenv("CACHD_CONFIG", str(file))
    assert load().streams == 3
    assert examine().loaded.config.streams == 3


def test_options_are_read_again_with_the_same_flags(file: Path) -> None:
    loaded = read(config=file, pulls=5)
    file.write_text("streams: 7\npulls: 9\n")
    again = loaded.again()
    assert (again.config.streams, again.config.pulls, loaded.config.streams) == (7, 5, 3)
    assert sorted(again.differs_from(loaded)) == ["allow", "streams"]
    assert loaded.differs_from(loaded) == []


def test_only_the_given_keys_are_updated_with_where_they_were_set(file: Path) -> None:
    before = read(config=file, pulls=5)
    file.write_text("\n\nstreams: 7\nretries: 1\n")
    now = before.again()
    updated = before.updated(now, {"streams", "allow"})
    assert (updated.config.streams, updated.config.retries, updated.config.allow) == (7, 8, ())
    assert updated.place("streams") == f"{file}:3"
    assert updated.place("pulls") == "--pulls"
    assert updated.given.settings.keys() == {"config", "streams", "pulls"}
    assert updated.content == file.read_bytes()
    assert (updated.flags, updated.last_good) == (before.flags, None)


def test_a_wrong_option_is_refused_and_the_right_ones_are_examined(file: Path) -> None:
    file.write_text("streams: many\npulls: 6\n")
    with pytest.raises(Invalid) as refused:
        read(config=file)
    assert refused.value.detail.startswith(f"{file}:1: streams: ")
    examined = examine(config=file)
    assert ([each.key for each in examined.findings], examined.more) == (["streams"], 0)
    assert (examined.loaded.config.streams, examined.loaded.config.pulls) == (32, 6)


def test_a_file_that_is_no_yaml_is_a_finding_beside_those_of_its_other_lines(file: Path) -> None:
    file.write_text("streams: 3\nstreams: 4\n")
    examined = examine(config=file)
    assert [each.place.line for each in examined.findings] == [2]
    assert isinstance(examined.loaded, Loaded)


def test_if_a_default_is_wrong_beside_a_value_no_value_is_used() -> None:
    examined = examine(high_watermark="90%", streams=3)
    assert [each.key for each in examined.findings] == ["low_watermark"]
    assert examined.loaded.config.high_watermark == Percentage(100)
    assert examined.loaded.config.streams == 32


@pytest.mark.parametrize("count", [MAX_FINDINGS, MAX_FINDINGS + 1, MAX_FINDINGS + 9])
def test_faults_beyond_the_most_are_counted(file: Path, count: int) -> None:
    file.write_text("allow:\n" + "- wrong\n" * count)
    examined = examine(config=file)
    assert len(examined.findings) == MAX_FINDINGS
    assert examined.more == count - MAX_FINDINGS


def test_kept_keys_take_the_place_of_those_of_the_file(file: Path) -> None:
    kept = ConfigFile("kept.json", b"of the wrong file", {"streams": "9"})
    last_good = LastGood(Invalid("why", code="bad_option"), 7.0)
    loaded = read_kept(kept, last_good, config=file, pulls=2)
    assert (loaded.config.streams, loaded.config.pulls, loaded.last_good) == (9, 2, last_good)
    assert loaded.content == b"of the wrong file"
    assert read(config=file).last_good is None
