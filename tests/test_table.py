"""`sources:` in the configuration: what is wrong with it, what holds for a ref, and that it holds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.config import RELOADED_KEYS, Config, load, read
from cachd.effective import effective
from cachd.errors import Forbidden, Invalid
from cachd.policy.prefixes import Prefix
from cachd.sources.entries import COLUMNS, Entry
from cachd.sources.table import Table
from tests.conftest import Engine
from tests.ground.bucket import Bucket
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import File, Origin, Redirect, Reply, Seen
from tests.ground.s3 import S3Server
from tests.ground.site import until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120
PAGE = Path(__file__).parent.parent / "docs/sources.md"
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


def table(*entries: Mapping[str, Any], **more: Any) -> Table:
    return Table(Config(sources=entries).sources, **more)


# --- what is wrong with it ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "- prefix: hf://org/\n  endpont: https://x\n",
            "2: sources[0].endpont: no such key; did you mean endpoint?",
        ),
        ("- endpoint: https://x\n", "1: sources[0].prefix: is missing"),
        ("- prefix: gs://b/\n", "1: sources[0].prefix: 'gs://b/' is not a prefix of refs"),
        ("- prefix: hf://a/\n- prefix: HF://A\n", "2: sources[1].prefix: sources[0] has this prefix, too"),
        (
            "- prefix: https://h/\n- prefix: https://H:443\n",
            "2: sources[1].prefix: sources[0] has this prefix, too",
        ),
        ("- prefix: hf://a/\n  region: us-east-1\n", "2: sources[0].region: is for s3:// alone"),
        (
            "- prefix: s3://bucket/\n  headers_file: /x\n",
            "2: sources[0].headers_file: is for https:// and http:// alone",
        ),
        ("- prefix: hf://\n  allow: [good]\n", "2: sources[0].allow: 'good' may be a name or a file"),
        ("- prefix: hf://a/\n  refuse: [sha256:12]\n", "2: sources[0].refuse: '12' is not a sha256 digest"),
        ("- prefix: hf://a/\n  allow: [sha256:12]\n", "2: sources[0].allow: '12' is not a sha256 digest"),
        (
            f"- prefix: hf://a/\n  allow: ['sha256:{'a' * 64}']\n",
            "2: sources[0].allow: a digest can be refused",
        ),
        (
            "- prefix: hf://a/\n  allow: true\n  refuse: true\n",
            "1: sources[0]: allow and refuse say opposite things",
        ),
        ("- prefix: hf://a/\n  limit: 500Mb\n", "2: sources[0].limit: "),
        ("- prefix: hf://a/\n  endpoint: https://u:p@h\n", "2: sources[0].endpoint: write https://HOST"),
        ("- prefix: s3://bucket/\n  instance_role: perhaps\n", "2: sources[0].instance_role: "),
        ("- prefix: https://u:hunter2@h/\n", "1: sources[0].prefix: "),
    ],
)
def test_a_fault_is_told_with_file_line_and_key(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "it.yaml"
    file.write_text("sources:\n" + text)
    line, _, rest = reason.partition(": ")
    with pytest.raises(Invalid) as refusal:
        load(config=file)
    assert f"{file}:{int(line) + 1}: {rest}" in refusal.value.detail
    assert "hunter2" not in refusal.value.detail


def test_the_table_may_stand_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CACHD_SOURCES", "[{prefix: hf://, allow: [good/]}, {prefix: s3://bucket/, limit: 5MB}]"
    )
    assert [str(entry.prefix) for entry in load().sources] == ["hf://", "s3://bucket/"]


def test_a_digest_that_is_none_is_refused_in_the_option_too(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("refuse: ['*.bin', 'sha256:12']\n")
    with pytest.raises(Invalid, match="sha256 digest"):
        load(config=tmp_path / "it.yaml")


def test_every_column_says_what_it_does_and_is_one_field() -> None:
    assert all(Entry.model_fields[column].description for column in COLUMNS)
    assert "sources" in RELOADED_KEYS


# --- what holds ---


def test_the_longest_prefix_wins_column_by_column() -> None:
    held = table(
        {"prefix": "s3://", "region": "one", "limit": "1MB"},
        {"prefix": "s3://bucket/", "region": "two", "profile": "it"},
        {"prefix": "s3://bucket/x/", "limit": "2MB"},
    ).held("s3://bucket/x/y/")
    assert {name: (each.value, str(each.by)) for name, each in held.items()} == {
        "region": ("two", "s3://bucket/"),
        "profile": ("it", "s3://bucket/"),
        "limit": (2_000_000, "s3://bucket/x/"),
    }


def test_an_entry_with_an_endpoint_takes_no_credentials_of_a_shorter_one() -> None:
    entries: list[dict[str, Any]] = [
        {"prefix": "s3://", "profile": "it", "instance_role": True, "region": "r"},
        {"prefix": "s3://bucket/", "endpoint": "https://h"},
        {"prefix": "s3://bucket/x/", "credentials": "/x"},
    ]
    assert set(table(*entries).held("s3://bucket/y/")) == {"region", "endpoint"}
    assert set(table(*entries).held("s3://bucket/x/")) == {"region", "endpoint", "credentials"}


def test_a_place_that_some_of_is_refused_is_asked_for_by_its_scheme_alone(engine: Engines, hub: Hub) -> None:
    """Else its web server would give what its scheme refuses."""
    hub.add("org/model", {"x.json": b"{}"})
    url = f"{hub.url}/org/model/resolve/main/x.json"
    running = engine(hf_endpoint=hub.url, sources=[{"prefix": "hf://evil/", "refuse": True}])
    with pytest.raises(Exception, match=r"refused by the entry hf://evil/"):
        running.pull(url)
    entries: list[dict[str, Any]] = [
        {"prefix": "hf://evil/", "refuse": True},
        {"prefix": f"{hub.url}/", "allow": True},
    ]
    assert table(*entries, endpoints={"hf": [hub.url]}).check(url) is None  # where the operator says so
    assert table(*entries[1:], endpoints={"hf": [hub.url]}).check(url) is None
    for other in ("https://huggingface.co./evil/x/resolve/main/y", "https://HF.co:443/evil/x"):
        with pytest.raises(Exception, match=r"refused by the entry hf://evil/"):
            table(*entries, endpoints={"hf": ["https://huggingface.co", "https://hf.co"]}).check(other)


ORG, DATASETS, DATA = "hf://org/", "hf://datasets/", "hf://datasets/org/"


@pytest.mark.parametrize(
    ("allowed", "refused", "refs"),
    [
        ([], [ORG], ["hf://kernels/org/k", "hf://datasets/ORG/d"]),
        (["hf://datasets/"], [ORG], ["hf://datasets/org/d"]),
        ([ORG], [DATASETS], ["hf://datasets/org/d"]),
        ([ORG], [DATA], ["hf://datasets/org/d"]),
    ],
)
def test_a_refused_organisation_or_kind_is_refused_in_every_form(
    allowed: list[str], refused: list[str], refs: list[str]
) -> None:
    separate = table(
        *({"prefix": each, "allow": True} for each in allowed),
        *({"prefix": each, "refuse": True} for each in refused),
    )
    for ref in refs:
        with pytest.raises(Forbidden):
            separate.check(ref)
    assert separate.check("hf://other/m") is None


@pytest.mark.parametrize(
    ("allow", "refuse"), [(["datasets/"], ["org/"]), (["org/"], ["datasets/"]), (["other/"], ["x/"])]
)
def test_a_list_refuses_an_organisation_or_kind_in_every_form(allow: list[str], refuse: list[str]) -> None:
    with pytest.raises(Forbidden):
        table({"prefix": "hf://", "allow": allow, "refuse": refuse}).check("hf://datasets/org/d")


def test_an_allowed_organisation_is_allowed_in_every_form_and_nobody_else() -> None:
    for allowing in (table({"prefix": "hf://", "allow": ["org/"]}), table(*_only(ORG))):
        for ref in ("hf://org/m", "hf://datasets/org/d", "hf://kernels/Org/k"):
            assert allowing.check(ref) is None
        for ref in ("hf://other/m", "hf://datasets/other/org", "hf://datasets/orgs/d", "hf://kernels/x/k"):
            with pytest.raises(Forbidden):
                allowing.check(ref)
    assert table(*_only(DATA), {"prefix": ORG, "refuse": True}).check("hf://datasets/org/d") is None


def _only(prefix: str) -> list[dict[str, Any]]:
    return [{"prefix": "hf://", "refuse": True}, {"prefix": prefix, "allow": True}]


def test_a_dataset_has_the_settings_of_its_organisation_before_those_of_datasets() -> None:
    held = table(
        {"prefix": DATASETS, "credentials": "/datasets", "limit": "1MB"},
        {"prefix": ORG, "credentials": "/org"},
        {"prefix": "hf://datasets/org/d", "limit": "2MB"},
    ).held("hf://datasets/org/d")
    assert {name: str(each.by) for name, each in held.items()} == {
        "credentials": ORG,
        "limit": "hf://datasets/org/d",
    }


def test_the_dataset_of_a_refused_organisation_is_not_pulled(engine: Engines, hub: Hub) -> None:
    hub.add("datasets/evil/d", {"x.json": b"{}"})
    running = engine(hf_endpoint=hub.url, sources=[{"prefix": "hf://evil/", "refuse": True}])
    for ref in ("hf://datasets/evil/d", f"{hub.url}/datasets/evil/d/resolve/main/x.json"):
        with pytest.raises(Forbidden, match=r"refused by the entry hf://evil/"):
            running.pull(ref, name="d")
    assert not hub.requests


class Renaming(Hub):
    """A Hub that leads from an old name to another, as the real one does after a rename."""

    def find(self, seen: Seen) -> File | Reply:
        return super().find(replace(seen, target=seen.target.replace("good/old", "evil/new")))


def test_a_name_that_the_hub_leads_on_to_a_refused_one_is_refused(engine: Engines) -> None:
    with Renaming() as hub:
        hub.add("evil/new", {"x.json": b"{}"})
        running = engine(hf_endpoint=hub.url, sources=[{"prefix": "hf://", "allow": ["good/"]}])
        with pytest.raises(Exception, match=r"hf://evil/new is refused"):
            running.pull("hf://good/old")


def test_an_origin_that_leads_to_another_scheme_is_refused_where_there_are_entries(
    engine: Engines, origin: Origin
) -> None:
    origin.fault("/x", Redirect(to="gopher://127.0.0.1/x"), methods=["HEAD"])
    sources = [{"prefix": f"{origin.url}/", "allow": True}]
    with pytest.raises(Forbidden, match="not under any prefix of allow"):
        engine(sources=sources).pull(f"{origin.url}/x#sha256={'0' * 64}")


def test_the_example_of_the_page_says_what_its_comments_say() -> None:
    text = PAGE.read_text().split("```yaml\n")[1].split("```")[0]
    config = Config.model_validate(yaml.load(text, yaml.BaseLoader))
    example = Table(config.sources, refuse=config.refuse)
    for ref in (
        "hf://Qwen/x",
        "hf://mistralai/x",
        "hf://acme/x",
        "s3://any/x/",
        "https://artifacts.acme.example/models/x/",
    ):
        assert example.check(ref) is None
    for ref in (
        "hf://evil/x",
        "hf://qwenother/x",
        "https://other.example/x",
        "https://artifacts.acme.example/x",
    ):
        with pytest.raises(Forbidden):
            example.check(ref)
    assert {name: str(each.value) for name, each in example.held("s3://acme-models/x/").items()} == {
        "endpoint": "https://minio.storage.svc:9000",
        "region": "us-east-1",
        "credentials": "/etc/cachd/minio",
        "limit": "500000000",
    }
    assert set(example.held("s3://any/x/")) == {"instance_role"}
    assert len(example.refused) == 1


# --- it is shown ---


def test_the_effective_options_show_each_column_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(
        "sources:\n- prefix: hf://org/\n  endpoint: https://hub.example\n  limit: 5MB\n- prefix: s3://bucket/\n"
        "  instance_role: true\n"
    )
    (found,) = (each for each in effective(read(config=file)) if each.key == "sources")
    assert found.value == [
        {
            "prefix": "hf://org/",
            "columns": {"endpoint": "https://hub.example", "limit": 5_000_000},
            "where": {"endpoint": f"{file}:3", "limit": f"{file}:4"},
        },
        {
            "prefix": "s3://bucket/",
            "columns": {"instance_role": True},
            "where": {"instance_role": f"{file}:6"},
        },
    ]


def test_cachd_sources_says_what_holds_for_a_ref_and_which_line_says_so(node: Nodes, hub: Hub) -> None:
    entries = [
        {"prefix": "hf://", "allow": ["org/"], "limit": "5MB"},
        {"prefix": "hf://org/", "endpoint": hub.url},
        {"prefix": "hf://org/private", "refuse": True},
    ]
    running = node(sources=entries, source_limits={"hf": "9MB", "s3": "3MB"}, refuse=["*.bin"])
    ended = running.cli("sources", "org/model", "-o", "json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["ref"], told["verdict"], told["error"]) == ("hf://org/model", "allowed", None)
    columns = {each["column"]: each for each in told["columns"]}
    assert columns["endpoint"]["value"] == hub.url
    assert columns["endpoint"]["prefix"] == "hf://org/"
    assert columns["endpoint"]["where"].startswith(f"{running.config}:")
    assert columns["limit"]["prefix"] == "hf://"
    assert columns["credentials"]["value"] is None
    assert columns["refuse"]["value"] == ["*.bin"]
    assert columns["refuse"]["prefix"] is None
    assert told["files"] == {"refuse": ["*.bin"], "allow": []}
    refused = running.cli("sources", "org/private")
    assert (refused.returncode, "is refused" in refused.stdout) == (5, True)
    other = {c["column"]: c for c in running.ask("GET", "/v1/sources?ref=s3://bucket/x/").document["columns"]}
    assert other["limit"]["value"] == 3_000_000
    assert running.ask("GET", "/v1/sources?ref=gpt2").status == 400
    options = running.cli("options", "--effective", "--config", str(running.config)).stdout
    assert f"endpoint={hub.url}" in options


# --- it holds ---


@contextmanager
def two_of_each(tmp_path: Path) -> Iterator[tuple[list[Hub], list[Any], list[Origin]]]:
    with ExitStack() as stack:
        hubs = [stack.enter_context(Hub()) for _ in range(2)]
        origins = [stack.enter_context(Origin()) for _ in range(2)]
        (tmp_path / "weed").mkdir()
        servers = [stack.enter_context(S3Server(tmp_path / "weed")), stack.enter_context(Bucket("private"))]
        yield hubs, servers, origins


def test_two_hubs_two_s3_servers_and_two_web_servers_each_have_their_own_credentials(
    node: Nodes, tmp_path: Path
) -> None:
    with two_of_each(tmp_path) as (hubs, (weed, scripted), origins):
        entries: list[dict[str, Any]] = []
        for number, hub in enumerate(hubs):
            hub.add(f"org{number}/model", {"model.safetensors": noise(MIB, number)}, private=True)
            token = tmp_path / f"token{number}"
            token.write_text(hub.token)
            entries.append({"prefix": f"hf://org{number}/", "endpoint": hub.url, "credentials": str(token)})
        for number, origin in enumerate(origins):
            origin.add(f"/web{number}", noise(MIB, 10 + number))
            header = tmp_path / f"headers{number}"
            header.write_text(f"Authorization: Bearer secret-of-{number}\n")
            entries.append({"prefix": f"{origin.url}/", "headers_file": str(header)})
        weed.put("models", "s3a/it", noise(MIB, 20), checksum="SHA256")
        scripted.put("s3b/it", noise(MIB, 21))
        keys = tmp_path / "keys"
        keys.write_text(
            f"[weed]\naws_access_key_id={weed.reader_key}\naws_secret_access_key={weed.reader_secret}\n"
            "[scripted]\naws_access_key_id=AKIDSCRIPTED\naws_secret_access_key=x\n"
        )
        for bucket, server, profile in (("models", weed, "weed"), ("private", scripted, "scripted")):
            entry = {"prefix": f"s3://{bucket}/", "endpoint": server.url, "credentials": str(keys)}
            entries.append({**entry, "profile": profile, "region": "us-east-1"})
        running = node(sources=entries, retries=0)
        refs = [f"hf://org{n}/model" for n in range(2)] + [f"{o.url}/web{n}" for n, o in enumerate(origins)]
        for ref in (*refs, "s3://models/s3a/", "s3://private/s3b/"):
            running.pull(ref)
        for name in ("org0--model", "org1--model", "web0", "web1", "s3a", "s3b"):
            answer = running.ready(name)
            assert answer.status == 200, (name, answer.document)
        secrets = [hub.token for hub in hubs] + [f"secret-of-{n}" for n in range(2)]
        for number, server in enumerate((*hubs, *origins)):
            seen = str(server.requests)
            assert secrets[number] in seen
            assert not [secret for secret in secrets if secret != secrets[number] and secret in seen]
        assert not [hub for hub in hubs if hub.leaked]
        assert weed.reader_key not in str(scripted.requests)


class Public(Bucket):
    """A bucket that anybody may read, and that answers nobody who signs."""

    def find(self, seen: Seen) -> File | Reply:
        if "authorization" in seen.headers or "X-Amz-" in seen.query:
            return Reply.of(400, {}, b"signed")
        return super().find(replace(seen, query=f"{seen.query}&X-Amz-Credential=AKIDSCRIPTED/"))


def test_an_endpoint_without_credentials_is_asked_without_a_signature(
    engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with Public() as bucket:
        bucket.put("m/it", noise(KIB))
        engine(sources=[{"prefix": "s3://models/", "endpoint": bucket.url}]).pull("s3://models/m/")
    assert (root / "models/m/it").read_bytes() == noise(KIB)


def test_the_limit_of_a_prefix_holds_for_it_and_for_no_other(engine: Engines, origin: Origin) -> None:
    slow, fast = origin.add("/slow/it", noise(2 * MIB, 1)), origin.add("/fast/it", noise(2 * MIB, 2))
    running = engine(sources=[{"prefix": f"{origin.url}/slow/", "limit": "1MB"}])
    assert running.bandwidth.rates() == {f"{origin.url}/slow/": 1_000_000}
    began = time.monotonic()
    running.pull(fast, name="fast")
    assert running.metrics.limited_seconds.labels("http")._value.get() == 0
    running.pull(slow, name="slow")
    assert time.monotonic() - began > 1.0
    assert running.metrics.limited_seconds.labels("http")._value.get() > 1.0


# --- it changes ---


def test_a_change_of_the_table_holds_for_new_pulls_without_a_restart(
    node: Nodes, hub: Hub, origin: Origin
) -> None:
    hub.add("org/a", {"x.json": b"{}"})
    url = origin.add("/it", noise(6 * MIB))
    running = node(hf_endpoint=hub.url, retries=0)
    hold = origin.hold("/it", after=MIB)
    running.pull(url)
    assert hold.reached.wait(PATIENCE_SECONDS)
    entries = [
        {"prefix": "hf://", "refuse": True},
        {"prefix": f"{origin.url}/", "refuse": True, "limit": "50MB"},
    ]
    running.configure(**{**running.options, "sources": entries})
    until(lambda: running.ask("GET", "/v1/sources").document["sources"])
    hold.release()
    assert running.ready("it").status == 200, "what runs goes on"
    running.pull("hf://org/a")
    assert running.ready("org--a").document["code"] == "source_refused"
    assert running.metric("cachd_limit_bytes_per_second", source=f"{origin.url}/") == 50_000_000
    assert running.ask("GET", "/v1/options").document["file"]["in_force"]
    running.configure(**{**running.options, "sources": []})
    until(lambda: not running.ask("GET", "/v1/sources").document["sources"])
    running.pull("hf://org/a")
    assert running.ready("org--a").status == 200
    assert running.metric("cachd_limit_bytes_per_second", source=f"{origin.url}/") == 0


def test_a_table_with_a_fault_leaves_the_one_before_in_force(node: Nodes, hub: Hub) -> None:
    running = node(hf_endpoint=hub.url, sources=[{"prefix": "hf://", "refuse": True}])
    running.configure(**{**running.options, "sources": [{"prefix": "hf://org@main"}]})
    until(lambda: running.ask("GET", "/v1/options").document["file"]["error"])
    running.pull("hf://org/a")
    assert running.ready("org--a").document["code"] == "source_refused"


def test_a_limit_set_over_the_api_outlives_a_change_of_the_table(node: Nodes) -> None:
    running = node()
    running.ask("PUT", "/v1/limits", {"bytes_per_second": "7MB"})
    running.configure(**{**running.options, "sources": [{"prefix": "hf://", "limit": "5MB"}]})
    until(lambda: running.metric("cachd_limit_bytes_per_second", source="hf://") == 5_000_000)
    assert running.ask("GET", "/v1/limits").document["bytes_per_second"] == 7_000_000
    running.ask("PUT", "/v1/limits", {"bytes_per_second": "8MB"})
    assert running.metric("cachd_limit_bytes_per_second", source="hf://") == 5_000_000


def test_sighup_takes_the_file_over_though_it_did_not_change(node: Nodes) -> None:
    running = node()

    def times_read() -> int:
        return len([entry for entry in running.log if entry.get("event") == "desired models read"])

    assert times_read() == 1
    os.kill(running.pid, signal.SIGHUP)
    until(lambda: times_read() == 2)


def test_an_entry_takes_a_prefix_that_was_read_already() -> None:
    prefix = Prefix.parse("hf://org/")
    assert Entry(prefix=prefix).prefix == Entry.model_validate({"prefix": "hf://org/"}).prefix == prefix
