"""`cachd env`: what it prints for each engine is what the tested examples of pods do."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import yaml

from cachd.pod.recipe import ENGINES, EngineName, Recipe
from tests.ground.needs import needs
from tests.ground.pod import run_in_pod
from tests.ground.site import Ground
from tests.ground.weights import gguf, safetensors
from tests.test_daemonset import NATIVE_SIDECARS, NEWEST, documents, validate
from tests.test_examples import EXAMPLES, pods
from tests.test_preflight import TEXT

OF_EXAMPLES = {
    EngineName.vllm: ("vllm/vllm.yaml", Recipe(EngineName.vllm, "qwen-instruct")),
    EngineName.sglang: ("sglang/sglang.yaml", Recipe(EngineName.sglang, "qwen-instruct")),
    EngineName.tgi: ("tgi/tgi.yaml", Recipe(EngineName.tgi, "qwen-instruct")),
    EngineName.llama_cpp: (
        "llama-cpp/llama-cpp.yaml",
        Recipe(EngineName.llama_cpp, "qwen-gguf", "qwen2.5-0.5b-instruct-q4_k_m.gguf"),
    ),
}


@pytest.mark.parametrize("version", [NATIVE_SIDECARS, NEWEST])
@pytest.mark.parametrize("engine", EngineName)
def test_the_pod_of_each_engine_passes_the_strict_schema(engine: EngineName, version: str) -> None:
    for name in ("qwen-instruct", "Org--Model_1.5", "A" * 96, "0"):
        validate(Recipe(engine, name).pod(), version)


@pytest.mark.parametrize("engine", OF_EXAMPLES)
def test_the_pod_of_each_engine_is_that_of_its_example(engine: EngineName) -> None:
    file, recipe = OF_EXAMPLES[engine]
    (example,) = [pod for each in documents((EXAMPLES / file).read_text()) for pod in pods(each)]
    made: Any = recipe.pod()["spec"]
    (ours,), (theirs,) = made["containers"], example["containers"]
    for key in ("name", "image", "command", "args", "env", "ports", "volumeMounts", "securityContext"):
        assert ours[key] == theirs[key], key
    assert made["volumes"] == example["volumes"]
    assert made.get("tolerations") == example.get("tolerations")
    for ours, theirs in zip(made["initContainers"], example["initContainers"], strict=True):
        times = {"args", "startupProbe"}  # some examples wait for less long
        assert {k: v for k, v in ours.items() if k not in times} == {
            k: v for k, v in theirs.items() if k not in times
        }
        assert ours["args"][:4] == theirs["args"][:4]


def test_every_engine_but_the_library_has_an_example() -> None:
    assert set(OF_EXAMPLES) == set(EngineName) - {EngineName.transformers}
    assert set(ENGINES) == set(EngineName)


def test_env_prints_variables_that_a_shell_reads_and_how_to_run(ground: Ground) -> None:
    ground.hub.add("org/text", dict(TEXT))
    ground.node.pull("hf://org/text")
    ground.node.ready("org--text")
    ended = ground.node.cli("env", "org--text")
    assert ended.returncode == 0, ended.stderr
    *variables, last = ended.stdout.splitlines()
    assert last == "# run: vllm serve /model/org--text --served-model-name org--text --port 8000"
    found = dict(shlex.split(line)[0].split("=", 1) for line in variables)
    assert found["HF_HUB_CACHE"] == "/cache/hub"
    assert found["HF_HUB_OFFLINE"] == "1"
    document = json.loads(ground.node.cli("env", "org--text", "-o", "json").stdout)
    assert document["env"] == found
    pod = yaml.safe_load(ground.node.cli("env", "org--text", "-o", "pod", "--cache", "/c").stdout)
    assert pod == Recipe(EngineName.vllm, "org--text", cache="/c").pod()
    own = ground.node.cli("env", "org--text", "--for", "transformers").stdout.splitlines()
    assert "MODEL=/model/org--text" in own
    unfit = ground.node.cli("env", "org--text", "--for", "llama.cpp")
    assert (unfit.returncode, "llama.cpp takes only GGUF" in unfit.stderr) == (2, True)


def test_env_names_the_file_for_llama_cpp_and_asks_where_there_is_a_choice(ground: Ground) -> None:
    halves = {f"m-Q4_0-0000{n + 1}-of-00002.gguf": gguf(split=(n, 2)) for n in range(2)}
    ground.hub.add("org/one", {**halves, "mmproj-F16.gguf": gguf()})
    ground.hub.add("org/two", {**halves, "m-Q8_0.gguf": gguf()})
    for name in ("one", "two"):
        ground.node.pull(f"hf://org/{name}")
        ground.node.ready(f"org--{name}")
    one = json.loads(ground.node.cli("env", "org--one", "-o", "json").stdout)
    assert one["path"] == "/model/org--one/m-Q4_0-00001-of-00002.gguf"
    two = ground.node.cli("env", "org--two")
    assert (two.returncode, "code: no_such_file" in two.stderr) == (2, True)
    assert "--file: m-Q4_0-00001-of-00002.gguf, m-Q8_0.gguf" in two.stderr
    chosen = ground.node.cli("env", "org--two", "--file", "m-Q8_0.gguf").stdout
    assert "--model /model/org--two/m-Q8_0.gguf" in chosen


def test_env_names_the_place_below_which_the_layout_of_triton_has_the_files(ground: Ground) -> None:
    models = {
        "moved": ("vllm", {**TEXT, "config.pbtxt": b""}, "moved/1", "config.json"),
        "alone": ("llama.cpp", {"m.gguf": gguf()}, "alone/1/m.gguf", ""),
        "versions": ("llama.cpp", {"1/m.gguf": gguf()}, "versions/1/m.gguf", ""),
    }
    for name, (engine, source, path, file) in models.items():
        ground.hub.add(f"org/{name}", dict(source))
        ground.node.pull(f"hf://org/{name}", name=name, layout="triton")
        assert ground.node.ready(name).status == 200
        ended = ground.node.cli("env", name, "--for", engine, "-o", "json")
        assert json.loads(ended.stdout)["path"] == f"/model/{path}"
        assert (ground.node.root / "models" / path / file).is_file()


def test_env_warns_of_what_an_engine_would_refuse_and_of_a_layout_that_fits_none(ground: Ground) -> None:
    ground.hub.add("org/odd", {"x.safetensors": safetensors(100) + b"more"})
    ground.node.pull("hf://org/odd")
    ground.node.ready("org--odd")
    unknown = ground.node.cli("env", "org--odd")
    assert unknown.returncode == 2
    assert "name one with --for: vllm" in unknown.stderr
    assert "code: no_engine" in unknown.stderr
    ended = ground.node.cli("env", "org--odd", "--for", "vllm")
    assert ended.returncode == 0
    assert "warning: x.safetensors: its tensors take 100 bytes" in ended.stderr
    assert "fits no known engine, not vllm" in ended.stderr
    assert ground.node.cli("env", "nobody").returncode == 3


def test_a_model_of_mistral_alone_is_started_in_its_own_form() -> None:
    args = Recipe(EngineName.vllm, "m", is_mistral=True).args
    assert args[-2:] == ["--load-format", "mistral"]
    assert "mistral" not in Recipe(EngineName.sglang, "m", is_mistral=True).args


LOADS = """
import os, pathlib
scratch = os.environ["TMPDIR"]
for key, value in os.environ.items():
    os.environ[key] = value.replace("/scratch", scratch)
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from safetensors import safe_open
model = snapshot_download("org/text")
assert model.startswith(os.environ["CACHE"]), model
with safe_open(hf_hub_download("org/text", "model.safetensors"), framework="numpy") as opened:
    assert set(opened.keys()) == {"w", "b"}
modules = pathlib.Path(os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules")))
for place in (pathlib.Path.home(), modules, pathlib.Path(constants.HF_TOKEN_PATH).parent):
    place.mkdir(parents=True, exist_ok=True)
    (place / "written").write_text("by the engine, or by the code of a model")
"""


@needs("pods")
@pytest.mark.parametrize("engine", [EngineName.vllm, EngineName.sglang, EngineName.transformers])
def test_with_the_printed_variables_a_client_without_home_or_network_loads_and_writes(
    ground: Ground, engine: EngineName
) -> None:
    ground.hub.add("org/text", dict(TEXT))
    ground.node.pull("hf://org/text")
    ground.node.ready("org--text")
    told = json.loads(ground.node.cli("env", "org--text", "--for", engine, "-o", "json").stdout)["env"]
    env = {key: value.replace("/cache", "$CACHE") for key, value in told.items()}
    ended = run_in_pod(ground.node.root, LOADS, env=env, uid=12345, network=False)
    assert ended.returncode == 0, ended.stderr
    bare = {key: "/nonexistent" for key in env if key in ("HOME", "HF_HOME")}
    assert run_in_pod(ground.node.root, LOADS, env=bare, uid=12345, network=False).returncode != 0
