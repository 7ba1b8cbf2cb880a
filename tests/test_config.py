"""Where an option comes from, what it may be, and how a wrong one is told."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from cachd.config import RELOADED_KEYS, Config, load, read, table
from cachd.daemon.listen import check_listen
from cachd.effective import effective
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.model import ModelSpec, Percentage, Ref
from cachd.settings.given import unknown_variables
from tests.ground.origin import Origin

TIB = 1 << 40


@pytest.fixture(autouse=True)
def no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("CACHD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachd.yaml"


def written(file: Path, **keys: object) -> Path:
    file.write_text(yaml.safe_dump(keys))
    return file


def refused(**flags: object) -> str:
    """What the refusal of the options says."""
    with pytest.raises(Invalid) as refusal:
        load(**flags)
    assert refusal.value.code in ("bad_option", "bad_config")
    return str(refusal.value)


# --- where an option comes from ---


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(file, streams=2, pulls=2, retries=2)
    monkeypatch.setenv("CACHD_STREAMS", "3")
    monkeypatch.setenv("CACHD_PULLS", "3")
    config = load(config=file, streams=4)
    assert (config.streams, config.pulls, config.retries) == (4, 3, 2)
    assert config.connect_seconds == Config.model_fields["connect_seconds"].default


def test_without_any_option_the_defaults_hold() -> None:
    config = load()
    assert config.root == Path("/var/lib/cachd")
    assert config.listen == ("127.0.0.1:8470",)
    assert config.models == ()


def test_a_flag_that_was_not_given_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_ROOT", "/srv/models")
    assert load(root=None).root == Path("/srv/models")


def test_an_empty_variable_hides_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_ALLOW", "")
    assert load(config=written(file, allow=["10.0.0.0/8"])).allow == ("10.0.0.0/8",)


def test_the_environment_may_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_CONFIG", str(written(file, streams=5)))
    assert load().streams == 5


def test_the_flag_names_the_file_before_the_environment_does(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHD_CONFIG", str(written(tmp_path / "other.yaml", streams=5)))
    assert load(config=written(file, streams=6)).streams == 6


def test_a_key_without_a_value_and_an_empty_file_change_nothing(file: Path) -> None:
    file.write_text("streams:\nmodels:\n")
    assert load(config=file) == load().model_copy(update={"config": file})
    file.write_text("")
    assert load(config=file).streams == load().streams


def test_no_dotenv_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("CACHD_STREAMS=77\n")
    monkeypatch.chdir(tmp_path)
    assert load().streams == 32


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().streams = 9


# --- wrong options are named ---


@pytest.mark.parametrize("key", ["stream", "Streams", "token"])
def test_an_unknown_key_is_named(file: Path, key: str) -> None:
    assert key in refused(config=written(file, **{key: 1}))


WRONG: dict[str, list[object]] = {
    "streams": [0, 257, -1, "many", 1.5, [], float("nan")],
    "pulls": [0, 257],
    "retries": [-1, 101],
    "stall_seconds": [0, -1, 3601, "soon", float("nan"), float("inf")],
    "connect_seconds": [0, 601],
    "listen": [8470, "8470", ":8470", "host", "host:", "host:port", "host:70000", "host:-1", ""],
    "reserve_free": [-1, "-1", "10XB", "GiB", "1,5G", "ten", [], 1.5, "101%", "-1%", "half", True],
    "limit_bytes": [-1, "10XB", [], 1.5, "101%", "auto"],
    "reserve_inodes": ["x%", -1],
    "low_watermark": ["90", 90, "101%", "low"],
    "high_watermark": ["97%", 1],
    "evict": ["perhaps", 5],
    "evict_unused_seconds": [-1, "soon"],
    "keep_opened_seconds": [-1, "soon"],
    "log_level": ["trace", 5],
    "log_format": ["xml"],
    "anonymous_writes": ["maybe", 7],
    "allow": [5, {"a": 1}, '["a"'],
    "models": [5, "hf://org/model", [5], [{}], [{"ref": 5}], [{"ref": "hf://o/m", "revision": "x"}]],
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_under_its_name(file: Path, option: str, value: object) -> None:
    assert option in refused(**{option: value})
    assert option in refused(config=written(file, **{option: value}))


def test_room_on_the_disk_is_bytes_or_a_share_of_it(file: Path) -> None:
    assert load().limit_bytes is None
    assert load(limit_bytes="500GB").limit_bytes == 500 * 10**9
    assert load(limit_bytes="60%").limit_bytes == Percentage(60)
    assert load(config=written(file, reserve_free="12.5 %")).reserve_free == Percentage(12.5)
    assert (load().reserve_free, load().reserve_inodes) == ("auto", "auto")
    assert load(low_watermark="90%").low_watermark == Percentage(90)


@pytest.mark.parametrize("value", ["5i", "5iB", "5 iB", "9" * 400])
def test_a_number_of_bytes_without_sense_is_refused_under_its_name(value: str) -> None:
    assert "reserve_free" in refused(reserve_free=value)


@pytest.mark.parametrize("value", ["::1:8470", "host/path:8470", "host:٣"])
def test_an_address_that_cannot_be_listened_on_is_refused_under_its_name(value: str) -> None:
    assert "listen" in refused(listen=value)


def test_every_wrong_option_is_named_at_once(file: Path) -> None:
    told = refused(config=written(file, streams=0, pulls="x", nonsense=1))
    assert all(name in told for name in ("streams", "pulls", "nonsense"))


@pytest.mark.parametrize("value", ["not JSON", "{", "[1]", '[{"ref": "hf://org/model", "x": 1}]'])
def test_a_wrong_variable_is_refused_under_its_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CACHD_MODELS", value)
    assert "models" in refused()


@pytest.mark.parametrize(
    "content",
    [
        b"- a\n- b\n",
        b"text",
        b"5",
        b"a: [",
        b"\xff\xfe\x00",
        b"a: !!python/object:os.system x",
        b"\t- x: [\n",
    ],
    ids=ascii,
)
def test_a_file_that_holds_no_keys_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert str(file) in refused(config=file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert str(path) in refused(config=path)


# --- bytes, lists, addresses ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (5, 5),
        ("5", 5),
        ("5B", 5),
        ("1K", 10**3),
        ("5 KB", 5 * 10**3),
        ("500MB", 500 * 10**6),
        ("1.5 G", 15 * 10**8),
        ("1Ki", 1 << 10),
        ("10GiB", 10 << 30),
        (" 2TiB ", 2 * TIB),
        ("0.5Gi", 1 << 29),
    ],
)
def test_bytes_are_written_with_or_without_a_unit(file: Path, value: object, expected: int) -> None:
    assert load(reserve_free=value).reserve_free == expected
    assert load(config=written(file, reserve_free=value)).reserve_free == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("*.bin", ("*.bin",)),
        ("*.bin, *.pt,", ("*.bin", "*.pt")),
        ('["*.bin", "*.pt"]', ("*.bin", "*.pt")),
        ("[no, 1e3, '*.pt']", ("no", "1e3", "*.pt")),
        (' ["a,b"]', ("a,b",)),
    ],
)
def test_a_list_is_words_with_commas_or_yaml_in_a_variable_and_in_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: tuple[str, ...]
) -> None:
    assert load(config=written(file, refuse=value)).refuse == expected
    monkeypatch.setenv("CACHD_REFUSE", value)
    assert load().refuse == expected


@pytest.mark.parametrize("value", ["127.0.0.1:0", "[::]:8470", "[::1]:65535", "localhost:1", "0.0.0.0:8470"])
def test_an_address_to_listen_on_is_a_host_and_a_port(value: str) -> None:
    assert load(listen=value).listen == (value,)


LOOPBACK = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "LOCALHOST:1"]
OPEN = ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.example.org:1", "[fe80::1]:1"]


@pytest.mark.parametrize("listen", LOOPBACK)
def test_loopback_needs_no_token(listen: str) -> None:
    check_listen(load(listen=listen))


@pytest.mark.parametrize("listen", OPEN)
def test_beyond_loopback_writes_need_a_token_or_the_operators_word(listen: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden) as refusal:
        check_listen(load(listen=listen))
    assert refusal.value.code == "open_writes"
    assert "token_file" in refusal.value.hint
    check_listen(load(listen=listen, token_file=tmp_path / "token"))
    check_listen(load(listen=listen, anonymous_writes=True))


def test_reads_that_need_a_token_need_tokens(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refusal:
        check_listen(load(anonymous_reads=False))
    assert "token_file" in refusal.value.hint
    check_listen(load(anonymous_reads=False, token_file=tmp_path / "token"))


# --- models ---

LISTED = [
    {"ref": "hf://org/model@main", "required": True},
    {"ref": "s3://bucket/llama/", "name": "mine", "pin": True, "priority": 5, "include": ["*.safetensors"]},
]


def test_models_are_wishes_with_what_goes_with_them(file: Path) -> None:
    models = load(config=written(file, models=LISTED)).models
    assert [model.spec for model in models] == [
        ModelSpec(Ref.parse("hf://org/model@main"), "org--model"),
        ModelSpec(Ref.parse("s3://bucket/llama/"), "mine", ("*.safetensors",), ()),
    ]
    assert [(m.required, m.pin, m.priority) for m in models] == [(True, False, 0), (False, True, 5)]


def test_models_may_come_as_json_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_MODELS", json.dumps(LISTED))
    assert [model.spec.name for model in load().models] == ["org--model", "mine"]


WRONG_MODELS = {
    "no ref": ({}, "ref"),
    "unknown key": ({"ref": "hf://org/model", "revision": "main"}, "revision"),
    "no scheme": ({"ref": "org"}, "'org'"),
    "climbing": ({"ref": "hf://org/model@../x"}, "'..'"),
    "a wrong name": ({"ref": "hf://org/model", "name": "../x"}, "../x"),
    "priority": ({"ref": "hf://org/model", "priority": 101}, "priority"),
    "a list in a list": ({"ref": "hf://org/model", "include": [["*.bin"]]}, "include"),
}


@pytest.mark.parametrize(("model", "named"), WRONG_MODELS.values(), ids=WRONG_MODELS.keys())
def test_a_wrong_model_is_refused_and_named(file: Path, model: dict[str, object], named: str) -> None:
    with pytest.raises(CachdError) as refusal:
        load(config=written(file, models=[LISTED[0], model]))
    assert isinstance(refusal.value, Invalid)
    assert named in str(refusal.value)


def test_models_of_one_last_part_need_no_names(file: Path) -> None:
    refs = ["file:///x/llama/main/", "file:///x/qwen/main/", "s3://one/v1/", "s3://two/v1/"]
    quantised = [{"ref": "hf://org/model", "include": [f"*{name}*"]} for name in ("Q4", "Q5")]
    models = load(config=written(file, models=[*({"ref": ref} for ref in refs), *quantised])).models
    assert len({model.spec.name for model in models}) == len(models)


def test_two_models_of_one_name_are_refused(file: Path) -> None:
    twice = [{"ref": "hf://org/model@v1"}, {"ref": "hf://org/model@v2"}]
    assert "org--model" in refused(config=written(file, models=twice))


def test_options_are_read_again_as_the_file_has_them_now(file: Path) -> None:
    before = read(config=written(file, streams=2, models=LISTED))
    assert [model.spec.name for model in before.config.models] == ["org--model", "mine"]
    written(file, models=LISTED[:1])
    assert [model.spec.name for model in before.again().config.models] == ["org--model"]
    for nothing in ({}, {"models": None}, {"models": []}):
        written(file, **nothing)
        assert before.again().config.models == ()
    file.unlink()
    with pytest.raises(Invalid):
        before.again()


def test_flags_and_variables_win_over_a_changed_file_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_MODELS", json.dumps(LISTED))
    before = read(config=written(file), streams=3)
    written(file, models=[], streams=4)
    assert before.again().config == before.config


# --- values as people write them ---


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("limit_bytes: 500gb", "limit_bytes", 500 * 10**9),
        ("limit_bytes: 1_000_000", "limit_bytes", 10**6),
        ("limit_bytes_per_second: 1Gbps", "limit_bytes_per_second", 125 * 10**6),
        ("source_limits: {hf: 100 Mbit/s}", "source_limits", {"hf": 12_500_000}),
        ("source_limits: hf=100 Mbit/s, s3=0", "source_limits", {"hf": 12_500_000, "s3": 0}),
        ("sweep_interval_seconds: 1h30m", "sweep_interval_seconds", 5400.0),
        ("scrub_interval_seconds: 2 days", "scrub_interval_seconds", 172800.0),
        ("stall_seconds: 1e1", "stall_seconds", 10.0),
        ("reserve_free: 20 %", "reserve_free", Percentage(20)),
        ("reserve_free: AUTO", "reserve_free", "auto"),
        ("streams: 1_0", "streams", 10),
        ("log_level: INFO", "log_level", "info"),
        ("log_level: Warn", "log_level", "warning"),
        ("log_format: JSON", "log_format", "json"),
        *((f"evict: {word}", "evict", True) for word in ("yes", "on", "1", "TRUE", "y")),
        *((f"evict: {word}", "evict", False) for word in ("no", "Off", "0", "false")),
    ],
)
def test_a_value_may_be_written_in_any_usual_way_wherever_it_stands(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str, value: object
) -> None:
    file.write_text(text)
    assert getattr(load(config=file), key) == value
    if "{" not in text:
        monkeypatch.setenv(f"CACHD_{key.upper()}", text.partition(": ")[2])
        assert getattr(load(), key) == value


@pytest.mark.parametrize("name", ["no", "on", "123", "0123", "1e3", "2026-01-02", "1.0", "true"])
def test_a_name_that_looks_like_a_number_or_a_flag_is_a_name(file: Path, name: str) -> None:
    file.write_text(f"models: [{{ref: hf://org/model, name: {name}, include: {name}}}]")
    (model,) = load(config=file).models
    assert (model.spec.name, model.include) == (name, (name,))


# --- the words of a refusal ---


def told_of(file: Path, text: str) -> list[str]:
    """The lines of the refusal of a file, without its path."""
    file.write_text(text)
    lines = refused_detail(config=file).splitlines()
    assert all(line.startswith(f"{file}") for line in lines), lines
    return [line.removeprefix(f"{file}") for line in lines]


def refused_detail(**flags: object) -> str:
    with pytest.raises(Invalid) as refusal:
        load(**flags)
    detail = refusal.value.detail
    assert not re.search(
        r"type=|pydantic|Input should|valid (string|integer|boolean|tuple)|input_", detail
    ), detail
    return detail


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
        ":10: source_limits.gopher: 'gopher' is none of 'hf', 's3', 'https', 'http' or 'file'",
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
    read: set[str] = set()
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
