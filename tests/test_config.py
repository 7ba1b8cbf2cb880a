"""Where an option comes from, and what it may be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.config import RELOADED_KEYS, Config, load, read
from cachd.config.api import ApiOptions
from cachd.config.cluster import ClusterOptions
from cachd.config.hub import HubOptions
from cachd.config.logs import LogsOptions
from cachd.config.models import ModelsOptions
from cachd.config.network import NetworkOptions
from cachd.config.options import table
from cachd.config.root import RootOptions
from cachd.config.sources import SourcesOptions
from cachd.config.space import SpaceOptions
from cachd.config.transfer import TransferOptions
from cachd.config.upkeep import UpkeepOptions
from cachd.daemon.listen import check_listen
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.model import Limits, ModelSpec, Percentage, Ref

TIB = 1 << 40


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


def refused_detail(**flags: object) -> str:
    with pytest.raises(Invalid) as refusal:
        load(**flags)
    detail = refusal.value.detail
    assert not re.search(
        r"type=|pydantic|Input should|valid (string|integer|boolean|tuple)|input_", detail
    ), detail
    return detail


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
    "hub_listen": [8471, "host", ":", ":70000", "unix:/run/hub.sock", "127.0.0.1:8471 plain"],
    "hub_allow": ["10.244.0.1/16", "pods", "10.244.0.0/33", 5],
    "hub_share": ["everybody", 5],
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


def test_the_hub_endpoint_listens_on_a_port_of_all_addresses_if_none_is_named() -> None:
    assert load().hub_listen == ()
    assert load(hub_listen=":8471").hub_listen == ("0.0.0.0:8471",)
    assert load(hub_listen="[::]:8471").hub_listen == ("[::]:8471",)
    assert load(hub_allow="10.244.0.0/16, fd00::7").hub_allow == ("10.244.0.0/16", "fd00::7/128")


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


def test_listed_models_are_model_specs_with_required_pin_and_priority(file: Path) -> None:
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
    nothings: tuple[dict[str, Any], ...] = ({}, {"models": None}, {"models": []})
    for nothing in nothings:
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


# --- numbers ---

NUMBERS: dict[str, tuple[float, float | None, float | None]] = {
    # the default, the least and the most
    "disk_at_least": (0, 0, 2**63 - 1),
    "streams": (32, 1, 256),
    "pulls": (4, 1, 256),
    "queued_pulls": (10_000, 0, 1_000_000),
    "limit_bytes_per_second": (0, 0, 2**63 - 1),
    "retries": (8, 0, 100),
    "resolve_seconds": (1800, None, 86400),
    "connect_seconds": (10, None, 600),
    "stall_seconds": (30, None, 3600),
    "evict_unused_seconds": (0, 0, None),
    "keep_opened_seconds": (300, 0, None),
    "keep_previous": (1, 0, 100),
    "scrub_bytes_per_second": (20_000_000, 0, 2**63 - 1),
    "scrub_interval_seconds": (7 * 86400, None, None),
    "sweep_interval_seconds": (3600, 0, None),
    "keep_unfinished_seconds": (86400, 0, None),
    "max_node_labels": (50, 1, 200),
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_has_its_default_and_its_bounds(option: str) -> None:
    default, least, most = NUMBERS[option]
    assert getattr(load(), option) == default
    for bound in (least, most):
        if bound is not None:
            assert getattr(load(**{option: bound}), option) == bound
    assert option in refused(**{option: -1 if least is None else least - 1})
    if least is None:
        assert option in refused(**{option: 0})
    if most is not None:
        assert option in refused(**{option: most + 1})


GROUPS = (
    RootOptions,
    ApiOptions,
    HubOptions,
    ModelsOptions,
    SourcesOptions,
    NetworkOptions,
    TransferOptions,
    SpaceOptions,
    UpkeepOptions,
    ClusterOptions,
    LogsOptions,
)


def test_each_option_is_of_one_group() -> None:
    keys = [key for group in GROUPS for key in group.model_fields]
    assert sorted([*keys, "config"]) == sorted(Config.model_fields)


def test_what_options_say_together_is_parsed(tmp_path: Path) -> None:
    config = load(
        listen=["127.0.0.1:1", f"unix:{tmp_path}/s probes"],
        hub_listen=["127.0.0.1:2"],
        limit_bytes_per_second="3MB",
        source_limits={"hf": "1MB"},
    )
    assert [str(each) for each in config.listeners] == ["127.0.0.1:1", f"unix:{tmp_path}/s"]
    assert [str(each) for each in config.hub_listeners] == ["127.0.0.1:2"]
    assert config.limits == Limits(3_000_000, {"hf": 1_000_000})
    assert (load().hub_listeners, load().limits) == ([], Limits())


@pytest.mark.parametrize("option", ["tls_key_file", "tls_client_ca_file"])
def test_a_file_of_tls_needs_a_certificate(option: str, tmp_path: Path) -> None:
    assert getattr(load(), option) is None
    assert option in refused(**{option: tmp_path / "file"})
    config = load(tls_cert_file=tmp_path / "pem", **{option: tmp_path / "file"})
    assert (getattr(config, option), config.tls_cert_file) == (tmp_path / "file", tmp_path / "pem")


def test_the_table_above_has_every_number() -> None:
    fields = Config.model_fields.items()
    assert {key for key, field in fields if type(field.default) in (int, float)} == NUMBERS.keys()


def test_switches_have_their_defaults() -> None:
    switches = {key: field.default for key, field in Config.model_fields.items() if field.annotation is bool}
    assert {key for key, value in switches.items() if value} == {"anonymous_reads", "evict"}


def test_a_low_watermark_may_be_as_high_as_the_high_one_and_no_higher() -> None:
    config = load(high_watermark="90%", low_watermark="90%")
    assert (config.low_watermark, config.high_watermark) == (Percentage(90), Percentage(90))
    assert "low_watermark" in refused(high_watermark="90%", low_watermark="91%")
    assert (load().low_watermark, load().high_watermark) == (Percentage(98), Percentage(100))


@pytest.mark.parametrize("signal", ["node_labels", "node_condition", "node_events"])
def test_a_signal_to_kubernetes_needs_the_name_of_the_node(signal: str, file: Path) -> None:
    assert not load().informs_kubernetes
    assert "node_name" in refused(**{signal: True})
    assert load(**{signal: True}, node_name="node-1").informs_kubernetes
    assert not load(node_name="node-1").informs_kubernetes
    assert load(startup_taint="cachd.dev/models-not-ready", node_name="node-1").informs_kubernetes


@pytest.mark.parametrize(("priority", "is_right"), [(100, True), (101, False), (-100, True), (-101, False)])
def test_a_listed_model_has_a_priority_from_minus_100_to_100(
    file: Path, priority: int, *, is_right: bool
) -> None:
    written(file, models=[{"ref": "hf://org/m", "priority": priority}])
    if is_right:
        assert load(config=file).models[0].priority == priority
    else:
        assert "models[0].priority" in refused(config=file)


def test_a_listed_model_is_plain_unless_it_says_otherwise(file: Path) -> None:
    (model,) = load(config=written(file, models=[{"ref": "hf://org/m"}])).models
    assert (model.required, model.pin, model.warm, model.priority) == (False, False, False, 0)
    assert model.spec == ModelSpec.asked("hf://org/m")


def test_the_table_shows_each_default_as_a_user_writes_it() -> None:
    rows = {key: (variable, default) for key, variable, default, _ in table()}
    for key, default in {
        "proxy": "",
        "allow": "",
        "source_limits": "",
        "evict": "true",
        "own_directory": "false",
        "listen": "127.0.0.1:8470",
        "streams": "32",
    }.items():
        assert rows[key] == (f"CACHD_{key.upper()}", default)
    helps = {key: text for key, _, _, text in table()}
    assert "if it is not set: SSL_CERT_FILE, else REQUESTS_CA_BUNDLE" in helps["ca_file"]
    reloaded = {key for key, text in helps.items() if text.endswith("; reloaded when the file changes")}
    assert reloaded == RELOADED_KEYS
