"""`layout: triton`: the plain view of a model is what Triton wants of a model in a model repository."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.config import Model
from cachd.errors import InUse, Invalid
from cachd.model import Manifest, ModelSpec
from cachd.model.triton import layout_of, place_of
from cachd.store.disk_store import DiskStore
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.hub_client import endpoint_node, get
from tests.ground.models import digests, noise
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.program import CACHD, run
from tests.ground.site import until
from tests.ground.stored import A, assert_nothing_left, keep, manifest_of, names_below, shown
from tests.ground.stored import hub as hub_of
from tests.ground.weights import gguf

Nodes = Callable[..., Node]
FILES = {
    "config.pbtxt": b'backend: "python"',
    "model.py": b"class TritonPythonModel: ...",
    "data/weights.bin": noise(300_000, 3),
}
REPOSITORY = {"twice/config.pbtxt": b"", "twice/1/model.py": b"pass"}


def arranged(files: dict[str, bytes] = FILES) -> dict[str, str]:
    """What the plain view shows of these files."""
    return shown({path if path == "config.pbtxt" else f"1/{path}": files[path] for path in files})


def assert_shown(root: Path, commit: str, *, name: str = "m", files: dict[str, bytes] = FILES) -> None:
    """The plain view has the files as Triton wants them, and the Hub view as the source has them."""
    plain, of_hub = root / "models" / name, hub_of(root) / "snapshots" / commit
    assert digests(plain) == arranged(files)
    assert digests(of_hub) == shown(files)
    for path in files:
        place = plain / (path if path == "config.pbtxt" else f"1/{path}")
        assert os.path.samestat(place.stat(), (of_hub / path).stat()), "both are links to one blob"
    assert {path.stat().st_mode & 0o777 for path in plain.resolve().rglob("*") if path.is_dir()} == {0o555}


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.add("org/model", FILES)


@pytest.fixture
def running(node: Nodes, hub: Hub, commit: str) -> Node:
    """A daemon on which the model is ready in this layout."""
    started = node(hf_endpoint=hub.url)
    assert started.pull("hf://org/model", name="m", layout="triton").status == 202
    assert started.ready("m").status == 200
    return started


@pytest.mark.parametrize(
    ("paths", "layout"),
    [
        (["model.onnx"], "triton"),
        (["config.pbtxt", "model.py", "deep/er/file"], "triton"),
        (["1_Pooling/config.json", "10"], "triton"),
        (["config.pbtxt", "model.py", "00/x", "01/x"], "triton"),
        (["config.pbtxt", "0/model.py"], None),
        (["config.pbtxt", "1/model.onnx"], None),
        (["model.onnx", "20/model.onnx"], None),
        (["twice/config.pbtxt", "twice/1/model.py"], None),
        (["onnx/1/model.onnx"], "triton"),
    ],
)
def test_a_model_with_versions_and_a_model_repository_stay_as_they_are(
    paths: list[str], layout: str | None
) -> None:
    assert layout_of(paths, "triton") == layout
    assert layout_of(paths, None) is None


def test_two_files_never_get_one_place() -> None:
    paths = ["config.pbtxt", "a/config.pbtx", "model.py", "10", "a/b"]
    places = [place_of(path, "triton") for path in paths]
    assert places == ["config.pbtxt", "1/a/config.pbtx", "1/model.py", "1/10", "1/a/b"]
    assert [place_of(path, None) for path in paths] == paths


def test_pods_find_a_version_below_the_model_and_hub_clients_the_names_of_the_source(
    running: Node, commit: str
) -> None:
    assert_shown(running.root, commit)
    ready = json.loads((running.root / "ready/m.json").read_text())
    assert ready["layout"] == "triton"
    assert running.ready("m").document["layout"] == "triton"
    assert running.ask("GET", "/v1/models/m").document["pull"]["layout"] == "triton"
    assert json.loads((running.root / "status/m.json").read_text())["layout"] == "triton"
    listed = running.ask("GET", "/v1/models/m/files").document["files"]
    assert [file["path"] for file in listed] == sorted(FILES), "the API has the names of the source"
    assert "triton" in running.cli("show", "m").stdout


def test_the_layout_outlives_a_restart_a_check_and_a_verification(running: Node, commit: str) -> None:
    running.kill()
    running.start()
    assert running.ready("m").status == 200
    assert running.cli("verify", "m").returncode == 0
    assert_shown(running.root, commit)
    assert not any(entry.get("event") == "readiness withdrawn" for entry in running.log)


@pytest.mark.parametrize("place", ["config.pbtxt", "1/model.py", "1/data/weights.bin"])
@pytest.mark.parametrize("how", ["deleted", "replaced", "written"])
def test_a_file_that_somebody_changes_is_noticed_and_repaired(
    running: Node, commit: str, place: str, how: str
) -> None:
    until(lambda: running.metric("cachd_view_watches"))
    path = running.root / "models/m" / place
    path.parent.chmod(0o755)
    if how == "written":
        path.chmod(0o644)
        with path.open("r+b") as opened:
            opened.write(b"damaged")
    else:
        path.unlink()
    if how == "replaced":
        path.write_bytes(b"another file")
    running.wait_for("repaired", name="m")
    assert running.ready("m").status == 200
    assert_shown(running.root, commit)


def test_a_damaged_blob_leaves_both_views_until_its_repair(store: DiskStore, root: Path) -> None:
    plain = manifest_of(FILES)
    manifest = Manifest(plain.base, A, plain.files, layout="triton")
    keep(store, FILES)
    store.publish(ModelSpec.asked("hf://org/model", "m", layout="triton"), manifest, now=1.0)
    (damaged,) = (file for file in manifest.files if file.path == "model.py")
    store.quarantine(damaged, "damaged", store.content.inode(damaged.blob), now=2.0)
    for view in (root / "models/.trees" / manifest.id, hub_of(root) / "snapshots" / A):
        left = {path.name for path in view.rglob("*") if path.is_file()}
        assert left == {"config.pbtxt", "weights.bin"}


def test_an_open_of_any_file_counts_as_use(engine: Callable[..., Engine], hub: Hub, commit: str) -> None:
    on = engine(hf_endpoint=hub.url)
    on.store.watch.start()
    snapshot = on.pull("hf://org/model", name="m", layout="triton")
    for now, place in enumerate(("config.pbtxt", "1/model.py", "1/data/weights.bin"), 1):
        (on.store.layout.model("m") / place).read_bytes()
        assert on.store.watch.opened_at(snapshot.manifest, float(now)) == now, place


def test_another_layout_is_another_model_of_the_name_and_fetches_nothing_again(
    engine: Callable[..., Engine], hub: Hub, commit: str
) -> None:
    on = engine(hf_endpoint=hub.url, keep_previous=1)
    plain = on.pull("hf://org/model", name="m")
    fetched = hub.cdn.bytes_sent()
    with pytest.raises(InUse) as refusal:
        on.pull("hf://org/model", name="m", layout="triton")
    assert (refusal.value.code, "layout triton" in refusal.value.detail) == ("name_taken", True)
    moved = on.pull("hf://org/model", name="m", layout="triton", replace=True)
    assert moved.manifest != plain.manifest
    assert moved.address != plain.address
    root = on.store.layout.root
    assert_shown(root, commit)
    assert digests(root / "models" / plain.address) == shown(FILES), "pods that hold it keep it"
    on.store.rollback("m", now=2e9)
    assert digests(root / "models/m") == shown(FILES)
    assert on.store.check("m", now=2e9) is None
    assert hub.cdn.bytes_sent() == fetched


def test_a_changed_option_of_a_configured_model_moves_its_view(node: Nodes, hub: Hub, commit: str) -> None:
    model: dict[str, Any] = {"ref": "hf://org/model", "name": "m"}
    running = node(hf_endpoint=hub.url, models=[model])
    assert running.ready("m").status == 200
    assert digests(running.root / "models/m") == shown(FILES)
    running.configure(**{**running.options, "models": [{**model, "layout": "triton"}]})
    until(lambda: running.ready("m").document.get("layout"))
    assert_shown(running.root, commit)


def test_an_address_of_one_layout_never_leads_to_another(
    engine: Callable[..., Engine], hub: Hub, commit: str
) -> None:
    on = engine(hf_endpoint=hub.url)
    plain = on.pull("hf://org/model", name="m")
    on.store.withdraw("m")
    moved = on.pull("hf://org/model", name="m", layout="triton")
    assert plain.address == f"m@{commit}"
    assert moved.address == f"m@{commit}-{moved.manifest[:8]}"


def test_both_layouts_of_a_commit_share_its_blobs_and_its_hub_view(
    engine: Callable[..., Engine], hub: Hub, commit: str
) -> None:
    on = engine(hf_endpoint=hub.url)
    on.pull("hf://org/model", name="plain")
    on.pull("hf://org/model", name="m", layout="triton")
    root = on.store.layout.root
    for gone in ("plain", "m"):
        assert_shown(root, commit)
        for name in ("plain", "m"):
            assert on.store.names.get(name) is None or on.store.check(name, now=2.0) is None
        on.store.withdraw(gone)
    assert_nothing_left(root)


def test_a_refresh_keeps_the_layout(running: Node, hub: Hub) -> None:
    newer = FILES | {"model.py": b"class TritonPythonModel: pass"}
    commit = hub.add("org/model", newer)
    assert running.pull("hf://org/model", name="m", layout="triton", refresh=True).status == 202
    until(lambda: running.ready("m").document["revision"] == commit)
    assert_shown(running.root, commit, files=newer)


@pytest.mark.parametrize(
    "files", [{"config.pbtxt": b"", "1/model.py": b"pass"}, REPOSITORY], ids=["versions", "repository"]
)
def test_a_source_that_has_the_form_already_is_shown_as_it_is(
    engine: Callable[..., Engine], hub: Hub, files: dict[str, bytes]
) -> None:
    hub.add("org/model", files)
    on = engine(hf_endpoint=hub.url)
    asked = on.pull("hf://org/model", name="m", layout="triton")
    assert digests(on.store.layout.model("m")) == shown(files)
    assert on.pull("hf://org/model", name="plain").manifest == asked.manifest


def test_copies_have_their_place_in_the_layout_too(engine: Callable[..., Engine], hub: Hub) -> None:
    files = {"config.pbtxt": b"", "model.onnx": b"graph", "model.onnx_data": noise(300_000, 7)}
    commit = hub.add("org/model", files)
    on = engine(hf_endpoint=hub.url)
    snapshot = on.pull("hf://org/model", name="m", layout="triton", copy=["*"])
    root, store = on.store.layout.root, on.store
    plain = root / "models/m"
    assert digests(plain) == arranged(files)
    assert digests(hub_of(root) / "snapshots" / commit) == shown(files)
    assert {p.stat().st_nlink for p in (plain / "1").iterdir()} == {1}
    assert (plain / "config.pbtxt").stat().st_nlink > 1, "the configuration of Triton is never a copy"
    manifest = store.manifests.of(snapshot)
    assert store.copies.lacking(manifest) == 0
    assert all(Path(place).exists() for place in store.copies.all_places())
    assert all(Path(place).exists() for place in store.copies.read_by_pods(manifest))
    assert store.check("m", now=2.0) is None
    store.withdraw("m")
    assert names_below(root / ".cachd/copies") == set()
    assert_nothing_left(root)


def test_the_path_of_a_model_of_one_file_is_where_pods_find_it(
    engine: Callable[..., Engine], hub: Hub, root: Path
) -> None:
    hub.add("org/model", {"m.gguf": gguf()})
    engine(hf_endpoint=hub.url).pull("hf://org/model", name="m", layout="triton")
    ready = json.loads((root / "ready/m.json").read_text())
    assert ready["file"] == "models/m/1/m.gguf"
    assert (root / ready["file"]).read_bytes() == gguf()


def test_the_longest_path_that_a_source_may_have_may_be_moved(
    engine: Callable[..., Engine], hub: Hub, root: Path
) -> None:
    longest = "/".join(["a" * 200] * 5 + ["b" * 14 + ".gguf"])
    hub.add("org/model", {longest: gguf()})
    moved = engine(hf_endpoint=hub.url).pull("hf://org/model", name="m", layout="triton")
    assert (len(longest), moved.file) == (1024, f"1/{longest}")
    assert (root / "models/m/1" / longest).is_file()


def test_clients_of_the_hub_endpoint_see_the_names_of_the_source(
    hub: Hub, commit: str, tmp_path: Path
) -> None:
    with endpoint_node(tmp_path / "root", hub) as node:
        node.pull("hf://org/model", name="m", layout="triton")
        assert node.ready("m").status == 200
        sent = hub.cdn.bytes_sent()
        for path, content in FILES.items():
            assert get(node, f"/org/model/resolve/main/{path}").body == content
        assert get(node, "/org/model/resolve/main/1/model.py").status == 404
        assert hub.cdn.bytes_sent() == sent


def test_a_pull_without_a_daemon_takes_the_option(hub: Hub, commit: str, root: Path) -> None:
    options = root.parent / "options.yaml"
    options.write_text(yaml.safe_dump({"hf_endpoint": hub.url, "allow": ["127.0.0.0/8"], "reserve_free": 0}))
    command = [*CACHD, "pull", "org/model", "--name", "m", "--layout", "triton", "--direct"]
    ended = run(
        [*command, "--root", str(root), "--config", str(options)],
        env={**os.environ},
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert_shown(root, commit)


def test_a_configured_model_says_its_layout_and_others_are_refused() -> None:
    model = Model.model_validate({"ref": "hf://org/model", "layout": "triton"})
    assert model.spec.layout == "triton"
    assert ModelSpec.from_document(model.spec.as_document()) == model.spec
    with pytest.raises(Invalid) as refusal:
        ModelSpec.asked("hf://org/model", layout="flat")
    assert refusal.value.code == "bad_layout"


def test_the_layout_is_part_of_the_id_and_a_manifest_without_one_keeps_its_id() -> None:
    plain = manifest_of(FILES)
    asked = Manifest(plain.base, A, plain.files, layout="triton")
    assert asked.id != plain.id
    assert Manifest.from_document(asked.as_document()) == asked
    assert "layout" not in plain.as_document()
