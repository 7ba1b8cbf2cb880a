"""What a pod finds: both views, through a read-only mount, as another user, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.model.optional import OPTIONAL
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.models import digests, minilm, noise, safetensors_model
from tests.ground.needs import needs, require
from tests.ground.pod import LOAD_DIRECTORY, LOAD_HUB, pod, read_model, run_in_pod

Engines = Callable[..., Engine]
MIB = 1 << 20

pytestmark = needs("pods")


def loaded(ended: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What the pod found, less the place where it found it."""
    assert ended.returncode == 0, ended.stderr
    found: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    found.pop("snapshot", None)
    return found


def add_model(hub: Hub, model: Path, repo: str) -> str:
    return hub.add(repo, {path: model / path for path in digests(model)})


def test_a_pod_loads_the_real_model_from_the_plain_view(hub: Hub, root: Path, engine: Engines) -> None:
    add_model(hub, minilm(), "org/minilm")
    engine(hf_endpoint=hub.url).pull("hf://org/minilm")
    found = loaded(run_in_pod(root, LOAD_DIRECTORY, env={"MODEL_DIR": "models/org--minilm"}))
    assert found == read_model(str(minilm()))
    assert found["tensors"] == 104


def test_a_pod_loads_the_real_model_by_its_repository_id(hub: Hub, root: Path, engine: Engines) -> None:
    commit = add_model(hub, minilm(), "org/minilm")
    engine(hf_endpoint=hub.url).pull("hf://org/minilm")
    expected = read_model(str(minilm()))
    assert loaded(run_in_pod(root, LOAD_HUB, env={"REPO": "org/minilm"})) == expected
    pinned = {"REPO": "org/minilm", "REVISION": commit}
    assert loaded(run_in_pod(root, LOAD_HUB, env=pinned)) == expected


def test_a_sharded_model_with_folders_loads_from_both_views(
    hub: Hub, root: Path, engine: Engines, tmp_path: Path
) -> None:
    model = safetensors_model(tmp_path / "made", shards=4, shard_bytes=5 * MIB, seed=8)
    add_model(hub, model, "org/sharded")
    engine(hf_endpoint=hub.url).pull("hf://org/sharded")
    expected = read_model(str(model))
    assert loaded(run_in_pod(root, LOAD_DIRECTORY, env={"MODEL_DIR": "models/org--sharded"})) == expected
    assert loaded(run_in_pod(root, LOAD_HUB, env={"REPO": "org/sharded"})) == expected


@pytest.mark.parametrize("subpath", ["models", "hub"])
def test_no_link_leaves_a_mount_of_one_view(hub: Hub, root: Path, engine: Engines, subpath: str) -> None:
    add_model(hub, minilm(), "org/minilm")
    engine(hf_endpoint=hub.url).pull("hf://org/minilm")
    if subpath == "models":
        ended = run_in_pod(root, LOAD_DIRECTORY, env={"MODEL_DIR": "org--minilm"}, subpath=subpath)
    else:
        env = {"REPO": "org/minilm", "HF_HUB_CACHE": "$CACHE"}
        ended = run_in_pod(root, LOAD_HUB, env=env, subpath=subpath)
    assert loaded(ended) == read_model(str(minilm()))


def test_a_model_of_another_source_loads_by_its_name_from_the_hub_view(
    root: Path, engine: Engines, tmp_path: Path
) -> None:
    model = safetensors_model(tmp_path / "share" / "mine", shards=2, shard_bytes=2 * MIB, seed=9)
    engine(allow=[f"file://{tmp_path}/share/"]).pull(f"file://{model}")
    assert loaded(run_in_pod(root, LOAD_HUB, env={"REPO": "mine"})) == read_model(str(model))


def test_an_offline_client_misses_nothing_of_a_filtered_pull(hub: Hub, root: Path, engine: Engines) -> None:
    files = {path: minilm() / path for path in digests(minilm())}
    hub.add("org/two", files | {"pytorch_model.bin": noise(MIB)})
    engine(hf_endpoint=hub.url).pull("hf://org/two", exclude=("*.bin",))
    assert loaded(run_in_pod(root, LOAD_HUB, env={"REPO": "org/two"})) == read_model(str(minilm()))


OLDER_CLIENT = """
import os
from pathlib import Path
hub, folder = Path(os.environ["HF_HUB_CACHE"]), os.environ["FOLDER"]
os.makedirs(hub / folder / "blobs", exist_ok=True)
(hub / ".locks" / folder).mkdir(parents=True, exist_ok=True)
"""


@pytest.mark.parametrize("uid", [0, 12345])
@pytest.mark.parametrize("folder", ["models--org--small", "models--new--small"])
def test_the_directories_that_older_clients_make_are_there(
    hub: Hub, root: Path, engine: Engines, folder: str, uid: int
) -> None:
    """huggingface_hub 0.23 and 0.36 make these before they use a file that they find."""
    hub.add("org/small", {"config.json": b"{}"})
    hub.rename("org/small", "new/small")
    engine(hf_endpoint=hub.url).pull("hf://org/small")
    ended = run_in_pod(root, OLDER_CLIENT, env={"FOLDER": folder}, uid=uid)
    assert ended.returncode == 0, ended.stderr


def test_the_directories_for_older_clients_go_with_the_last_snapshot_and_are_repaired_before(
    hub: Hub, root: Path, engine: Engines
) -> None:
    hub.add("org/small", {"config.json": b"{}"})
    running = engine(hf_endpoint=hub.url)
    running.pull("hf://org/small", name="m")
    places = [root / "hub/models--org--small/blobs", root / "hub/.locks/models--org--small"]
    for place in places:
        place.rmdir()
    running.store.check("m", now=0.0)  # as after an upgrade from a version that made none
    assert all(place.is_dir() for place in places)
    running.store.withdraw("m")
    assert os.listdir(root / "hub/.locks") == []
    assert set(os.listdir(root / "hub")) <= {".locks", "CACHEDIR.TAG"}


KNOWN_TO_BE_ABSENT = """
import json, os, sys
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
seen = {path: try_to_load_from_cache("org/part", path) for path in sys.stdin.read().split()}
print(json.dumps({path: "absent" if found is _CACHED_NO_EXIST else found for path, found in seen.items()}))
"""


def test_a_client_with_a_network_learns_from_the_view_which_optional_files_there_are_not(
    hub: Hub, root: Path, engine: Engines
) -> None:
    """Else it asks for each six times when nothing answers: a start took minutes."""
    there = {
        "config.json": b"{}",
        "vocab.txt": b"w",
        "merges.txt": b"",
        "1_Pooling/other.json": b"{}",
    }
    hub.add("org/part", there)
    engine(hf_endpoint=hub.url).pull("hf://org/part", exclude=("merges.txt",))
    with pod(root, KNOWN_TO_BE_ABSENT, env={"HF_HUB_OFFLINE": "0"}, network=False) as client:
        output, errors = client.communicate("\n".join([*OPTIONAL, "other.txt"]), timeout=60)
    assert client.returncode == 0, errors
    found = json.loads(output)
    absent = {path for path, state in found.items() if state == "absent"}
    assert absent == set(OPTIONAL) - set(there)
    assert {"tokenizer.json", "generation_config.json", "1_Pooling/config.json"} < absent
    assert found["merges.txt"] is None, "a file that was left out is not absent"


def test_a_pod_cannot_enter_the_private_part(hub: Hub, root: Path, engine: Engines) -> None:
    require("users")
    hub.add("org/small", {"config.json": b"{}"})
    engine(hf_endpoint=hub.url).pull("hf://org/small")
    ended = run_in_pod(root, "import os; os.listdir(os.environ['CACHE'] + '/.cachd')")
    assert ended.returncode != 0
    assert "PermissionError" in ended.stderr


DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("org/model", endpoint=sys.argv[1], cache_dir=sys.argv[2], token=False))
"""


def test_cachd_publishes_what_the_hubs_own_client_downloads(
    hub: Hub, root: Path, engine: Engines, tmp_path: Path
) -> None:
    """Promised: What the Hub's own client finds offline is what it would have downloaded."""
    model = safetensors_model(tmp_path / "made", shards=2, shard_bytes=3 * MIB, seed=10)
    commit = add_model(hub, model, "org/model")
    theirs = tmp_path / "theirs"
    subprocess.run([sys.executable, "-c", DOWNLOAD, hub.url, str(theirs)], check=True, capture_output=True)
    engine(hf_endpoint=hub.url).pull("hf://org/model")
    repo = "models--org--model"
    assert digests(root / "hub" / repo / "snapshots" / commit) == digests(
        theirs / repo / "snapshots" / commit
    )
    for file in ("refs/main", f"trees/{commit}.json"):
        ours, client = ((cache / repo / file).read_text() for cache in (root / "hub", theirs))
        assert (json.loads(ours) == json.loads(client)) if file.endswith("json") else ours == client
