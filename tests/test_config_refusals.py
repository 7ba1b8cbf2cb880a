"""What the refusal of wrong options says: every fault, with its file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachd.config import Config, load
from cachd.settings.given import unknown_variables
from tests.test_config import refused_detail, written


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachd.yaml"


def told_of(file: Path, text: str) -> list[str]:
    """The lines of the refusal of a file, without its path."""
    file.write_text(text)
    lines = refused_detail(config=file).splitlines()
    assert all(line.startswith(f"{file}") for line in lines), lines
    return [line.removeprefix(f"{file}") for line in lines]


def test_every_fault_of_a_file_is_told_at_once_with_its_line_and_key_and_in_its_order(file: Path) -> None:
    text = """\
streams: many
allow:
  - 10.0.0.0/8
  - 300.0.0.0/8
stall_seconds: 2h
pulls: 0
evict: perhaps
log_level: loud
limit_bytes_per_second: 500Mb
source_limits: {gopher: 1MB}
models:
  - ref: hf://org/model
    priority: high
  - name: no-ref
  - {ref: hf://org/other, name: ../x}
  - hf://org/third
  - ref: hf://org/fourth
    include: [[a]]
root: [a]
"""
    prefixes = "write 10.0.0.0/8, http://host:port/path/ or file:///mnt/share/"
    assert told_of(file, text) == [
        ":1: streams: 'many' is not a whole number from 1 to 256",
        f":4: allow[1]: allow entry '300.0.0.0/8' is neither a network nor a URL prefix ({prefixes})",
        ":5: stall_seconds: 7200 is more than 3600",
        ":6: pulls: '0' is not a whole number from 1 to 256",
        ":7: evict: 'perhaps' is neither true nor false",
        ":8: log_level: 'loud' is none of 'debug', 'info', 'warning' or 'error'",
        ":9: limit_bytes_per_second: '500Mb' may mean bits or bytes: write 500Mbit/s or 500MB/s",
        ":10: source_limits.gopher: 'gopher' is none of 'hf', 'ms', 's3', 'https', 'http' or 'file'",
        ":13: models[0].priority: 'high' is not a whole number from -100 to 100",
        ":14: models[1].ref: is missing",
        *(line for line in told_of(file, text) if line.startswith(":15: models[2]: ") and "../x" in line),
        ":16: models[3]: is not a mapping of keys to values",
        ":18: models[4].include[0]: is not a string",
        ":19: root: is not a string",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "strems: 3": ":1: strems: no such key; did you mean streams?",
        "Streams: 3": ":1: Streams: no such key; did you mean streams?",
        "hf-token-file: /x": ":1: hf-token-file: no such key; did you mean hf_token_file?",
        "xyzzy: 3": ":1: xyzzy: no such key",
        "models:\n- ref: hf://a/b\n  exlude: x": ":3: models[0].exlude: no such key; did you mean exclude?",
    }.items(),
)
def test_an_unknown_key_is_told_with_the_nearest_there_is(file: Path, text: str, told: str) -> None:
    assert told_of(file, text) == [told]


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "streams: 1\nstreams: 2": ":2: streams: is set twice, in lines 1 and 2",
        "models:\n- {ref: a,\n   ref: b}": ":3: models[0].ref: is set twice, in lines 2 and 3",
        "streams: 1\n\tpulls: 2": ":2: a tab: indent with spaces",
        "streams: 1\n pulls: 2": ":2: wrong indentation, or a value with ': ' that needs quotes",
        "- a": ":1: has no keys",
        "hf://org/model": ":1: has no keys",
        "? [a]\n: b": ":1: a key is one word, not a list or a mapping",
        "streams: !!int 4": ":1: streams: a value that starts with ! is a tag: quote the value",
        "streams: *four": ":1: a value that starts with * is an alias of an anchor: quote the value",
        "streams: @4": ":1: a value cannot start with @ or `: quote it",
        "streams: '4": ":1: the end of the file inside quotes",
        "streams: 4\n---\nstreams: 5": ":2: a second document: only one is read",
        "streams: 4\npulls: \x07": ":2: a control character",
        "<<: 5": ":1: << takes a mapping",
        "a: " + "[" * 30 + "]" * 30: ":1: nested deeper than 20 levels",
        "a: " + "[" * 3000: ": nested deeper than 20 levels",
    }.items(),
    ids=lambda text: ascii(text)[:30],
)
def test_yaml_that_cannot_be_meant_is_told_by_its_line(file: Path, text: str, told: str) -> None:
    assert told in told_of(file, text)


def test_a_file_of_another_encoding_is_told_by_its_line_and_a_byte_order_mark_is_fine(file: Path) -> None:
    file.write_bytes(b"streams: 4\nroot: /caf\xe9\n")
    assert refused_detail(config=file) == f"{file}:2: not UTF-8"
    file.write_text("streams: 4", encoding="utf-16")
    assert refused_detail(config=file) == f"{file}:1: not UTF-8"
    file.write_text("streams: 4", encoding="utf-8-sig")
    assert load(config=file).streams == 4


def test_what_is_no_small_file_is_refused_and_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))
    reasons = {
        tmp_path: "not a regular file",
        tmp_path / "pipe": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "long": "longer than 1048576 bytes",
        tmp_path / "absent": "No such file or directory",
    }
    for path, reason in reasons.items():
        assert refused_detail(config=path) == f"{path}: the configuration file cannot be read: {reason}"


def test_anchors_are_taken_and_a_bomb_of_them_is_not(file: Path) -> None:
    file.write_text(
        "models:\n- &m {ref: hf://a/b, exclude: &x ['*.bin']}\n"
        "- {<<: *m, name: c}\n- {ref: hf://d/e, exclude: *x}\n"
    )
    models = load(config=file).models
    assert [(m.name, m.exclude) for m in models] == [(name, ("*.bin",)) for name in (None, "c", None)]
    merged = "models:\n- &m {streams: many, ref: x}\n<<: *m\nstreams: 4\npulls: many\n"
    assert ": ref: no such key; did you mean refuse?" in told_of(file, merged)
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 15))
    assert "too many values" in told_of(file, laughs)[0]
    assert "nested deeper" in told_of(file, "a: &a [*a]")[0]


def test_a_wrong_variable_and_a_wrong_flag_are_told_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_STREAMS", "many")
    monkeypatch.setenv("CACHD_MODELS", "[{ref: hf://a/b, exlude: x}]")
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    assert refused_detail(listen="here").splitlines() == [
        "--listen: listen[0]: write HOST:PORT, such as 127.0.0.1:8470 or [::]:8470, or unix:/PATH",
        "CACHD_MODELS: models[0].exlude: no such key; did you mean exclude?",
        "CACHD_STREAMS: streams: 'many' is not a whole number from 1 to 256",
        "HF_ENDPOINT: hf_endpoint: write https://HOST[:PORT][/PATH], with no user, password or query",
    ]


def test_a_hundred_faults_are_told_as_fifty_and_how_many_more(file: Path) -> None:
    lines = refused_detail(config=written(file, **{f"x{n}": n for n in range(100)})).splitlines()
    assert (len(lines), lines[-1]) == (51, "and 50 more")


def test_a_variable_that_is_no_option_is_told_with_the_nearest_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = (
        "CACHD_SERVICE_HOST",
        "CACHD_PORT",
        "CACHD_PORT_8470_TCP_ADDR",
        "CACHD_METRICS_SERVICE_PORT_HTTP",
    )
    for name in (
        *theirs,
        "CACHD_SERVER",
        "CACHD_TOKEN",
        "CACHD_STREAMS",
        "cachd_pulls",
        "CACHD_STREMS",
        "CACHD_ZZ",
    ):
        monkeypatch.setenv(name, "5")
    assert (load().streams, load().pulls) == (5, 5)
    assert unknown_variables(Config.model_fields) == [
        "CACHD_STREMS is no option; did you mean CACHD_STREAMS?",
        "CACHD_ZZ is no option",
    ]
