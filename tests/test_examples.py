"""The examples of pods: they pass strict schemas, hold to the rules of the mount, and their commands run."""

from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachd import __version__
from cachd.store.disk_store import DiskStore
from tests.ground.hub import Hub
from tests.ground.node import Node
from tests.ground.stored import publish
from tests.test_daemonset import BASE, NATIVE_SIDECARS, NEWEST, OLDEST, documents, validate

Object = dict[str, Any]
EXAMPLES = BASE / "examples"
OTHERS = {"tls", "tokens.yaml"}  # of the daemon, not of a pod: tests/test_daemonset.py
FILES = sorted(
    str(path.relative_to(EXAMPLES))
    for path in EXAMPLES.rglob("*.yaml")
    if path.relative_to(EXAMPLES).parts[0] not in OTHERS
)
FOLDERS = sorted({Path(file).parts[0] for file in FILES})
WRAPPERS = [file for file in FILES if "wrapper" in file]
OF_OPERATORS = {"ClusterStorageContainer", "InferenceService", "DynamoGraphDeployment"}
HOLD = re.search(
    r"```shell\n# hold:.*?\n(.*?)exec vllm", (BASE.parent / "docs/pods.md").read_text(), re.DOTALL
)
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def pods(document: Object) -> Iterator[Object]:
    """The specs of pods in an object. An operator's own object has one in another place."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "Deployment" | "Job":
            yield spec["template"]["spec"]
        case "CronJob":
            yield spec["jobTemplate"]["spec"]["template"]["spec"]
        case "InferenceService":
            predictor = dict(spec["predictor"])
            server = {
                k: v for k, v in predictor.pop("model").items() if k not in ("modelFormat", "storageUri")
            }
            yield {**predictor, "containers": [{"name": "server", "image": "server", **server}]}
        case "DynamoGraphDeployment":
            for service in spec["services"].values():
                extra = dict(service["extraPodSpec"])
                claims = [
                    {"name": each["name"], "mountPath": each["mountPoint"], "readOnly": True}
                    for each in service.get("volumeMounts", [])
                ]
                main = extra.pop("mainContainer")
                main = {"name": "main", **main, "volumeMounts": [*main.get("volumeMounts", []), *claims]}
                yield {**extra, "containers": [main]}


def all_pods(file: str) -> list[Object]:
    return [pod for document in documents((EXAMPLES / file).read_text()) for pod in pods(document)]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def has_sidecar(file: str) -> bool:
    return any("restartPolicy" in each for pod in all_pods(file) for each in pod.get("initContainers", []))


# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["oldest", NEWEST])
@pytest.mark.parametrize("file", FILES)
def test_every_object_passes_the_strict_schema(file: str, version: str) -> None:
    oldest = NATIVE_SIDECARS if has_sidecar(file) else OLDEST
    for document in documents((EXAMPLES / file).read_text()):
        if document["kind"] not in OF_OPERATORS:
            validate(document, NEWEST if version == NEWEST else oldest)
        for pod in pods(document):
            bare = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
            validate(bare, NEWEST if version == NEWEST else oldest)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_short_page_that_names_its_files(folder: str) -> None:
    page = (EXAMPLES / folder / "README.md").read_text()
    for file in (file for file in FILES if Path(file).parts[0] == folder):
        assert f"daemonset/examples/{file}" in page
    assert len(page.splitlines()) <= 14


@pytest.mark.parametrize("file", FILES)
def test_no_pod_has_rights_or_a_token_of_kubernetes(file: str) -> None:
    for pod in all_pods(file):
        for each in containers(pod):
            if "securityContext" in each:
                assert each["securityContext"]["allowPrivilegeEscalation"] is False
                assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            if each["image"].startswith("cachd"):
                assert each["image"] == f"cachd:{__version__}"
                assert each["securityContext"]["readOnlyRootFilesystem"] is True
                assert "memory" in each["resources"]["limits"]
        if "dynamo" not in file:  # the operator's own defaults
            assert pod["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("file", FILES)
def test_the_cache_is_mounted_whole_and_read_only_and_never_created(file: str) -> None:
    for pod in all_pods(file):
        for volume in pod.get("volumes", []):
            assert volume.get("hostPath", {"type": "Directory"})["type"] == "Directory"
            assert volume.get("hostPath", {"path": "/var/lib/cachd"})["path"] == "/var/lib/cachd"
        for each in containers(pod):
            for mount in each.get("volumeMounts", []):
                if mount["mountPath"].startswith("/cache"):
                    assert (mount["mountPath"], mount["readOnly"]) == ("/cache", True)


@pytest.mark.parametrize("file", FILES)
def test_engines_are_offline_and_write_outside_the_cache(file: str) -> None:
    engines = [
        each
        for pod in all_pods(file)
        for each in pod["containers"]
        if any(mount["mountPath"] == "/cache" for mount in each.get("volumeMounts", []))
    ]
    for each in engines:
        variables = {variable["name"]: variable["value"] for variable in each["env"]}
        if "lightning-asr" not in file:
            assert variables["HF_HUB_OFFLINE"] == "1"
            assert "/cache/hub" in (variables.get("HF_HUB_CACHE"), variables.get("HUGGINGFACE_HUB_CACHE"))
        for name in ("HOME", "HF_HOME"):
            assert variables[name].startswith("/scratch")
        writable = [mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")]
        assert "/scratch" in writable


@pytest.mark.parametrize("file", [file for file in FILES if has_sidecar(file)])
def test_a_sidecar_holds_the_model_that_the_engine_reads(file: str) -> None:
    for pod in all_pods(file):
        for hold in (each for each in pod.get("initContainers", []) if "restartPolicy" in each):
            name = hold["args"][1]
            assert hold["args"] == ["hold", name, "--cache", "/cache", "--link", "/model"]
            assert hold["startupProbe"]["exec"]["command"] == ["test", "-d", f"/model/{name}/"]
            (engine,) = pod["containers"]
            words = [*engine.get("command", []), *engine.get("args", [])]
            words += [variable["value"] for variable in engine["env"]]
            assert "kserve" in file or any(f"/model/{name}" in word for word in words)


# --- what runs -------------------------------------------------------------------------------------------


def script_of(container: Object) -> str:
    """The text that a container gives its shell."""
    shell, option, script = container["command"][:3]
    assert (shell, option[0]) == ("sh", "-")
    return str(script)


def stubs(place: Path) -> Path:
    """Programs by the names of engines: each prints its arguments and ends at the end of its input."""
    place.mkdir()
    for name in ("vllm", "python3", "text-generation-launcher", "tritonserver", "llama-server", "REPLACE"):
        stub = place / name
        stub.write_text('#!/bin/sh\necho "$@"\ncat > /dev/null\n')
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return place


@pytest.mark.parametrize("file", WRAPPERS)
def test_the_shell_of_a_wrapper_holds_the_model_while_its_engine_runs(file: str, tmp_path: Path) -> None:
    assert HOLD is not None
    wait, engine = containers(all_pods(file)[-1])
    assert wait["args"][0] == "wait"
    assert HOLD[1] in script_of(engine), "as docs/pods.md has it"
    variables = {variable["name"]: variable["value"] for variable in engine["env"]}
    name = variables["MODEL"]
    assert wait["args"][1] == name
    link = tmp_path / "model"
    link.mkdir()
    programs = stubs(tmp_path / "bin")
    script = script_of(engine).replace("/app/", f"{programs}/")
    environment = {**os.environ, "PATH": f"{programs}:{PATH}"}
    environment |= {"CACHE": str(tmp_path / "root"), "MODEL": name, "LINK": str(link)}
    (tmp_path / "root").mkdir(mode=0o755)
    with DiskStore(tmp_path / "root") as store:
        snapshot = publish(store, {"config.json": b"{}"}, name=name)
        command = [*engine["command"][:2], script, *engine["command"][3:], *engine.get("args", [])]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            said = running.stdout.readline()
            assert f"{link}/{name}" in said or variables.get("MODEL_PATH", "").startswith(f"/model/{name}")
            assert store.protection.is_in_use(store.manifests.of(snapshot))
            running.communicate()
            assert running.returncode == 0
        assert not store.protection.is_in_use(store.manifests.of(snapshot))


def test_the_served_name_is_not_the_path() -> None:
    for file in ("vllm/vllm.yaml", "sglang/sglang.yaml", "blue-green/chat.yaml", "vllm/wrapper/vllm.yaml"):
        for pod in all_pods(file):
            words = " ".join([*pod["containers"][0]["command"], *pod["containers"][0].get("args", [])])
            assert "--served-model-name" in words


@pytest.mark.parametrize("file", ["prewarm/prewarm.yaml", "prewarm/once/prewarm.yaml"])
def test_the_prewarm_job_makes_the_model_ready_on_every_node_that_the_service_names(
    file: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    (pod,) = all_pods(file)
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    script = script_of(container)
    with Hub() as hub:
        hub.add("Qwen/Qwen2.5-0.5B-Instruct", {"config.json": b"{}"})
        options = {"hf_endpoint": hub.url, "token_file": str(tmp_path / "token")}
        with Node(tmp_path / "node", options) as node:
            here = {"NODES": "127.0.0.1", "PORT": node.url.rpartition(":")[2]}
            here["CACHD_TOKEN_FILE"] = str(tmp_path / "token")
            environment = {**os.environ, **variables, **here, "PATH": PATH}
            ended = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            assert (tmp_path / "node/ready/qwen-next.json").exists()
            for wrong in ({"NODES": "absent.invalid"}, {"REF": "hf://Qwen/absent", "NAME": "absent"}):
                failed = subprocess.run(["sh", "-ec", script], env=environment | wrong, capture_output=True)
                assert failed.returncode != 0, wrong


@pytest.mark.parametrize(
    ("file", "repository", "name"),
    [
        ("own-copy/disk.yaml", "Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q4_k_m.gguf"),
        ("own-copy/memory.yaml", "Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q4_k_m.gguf"),
        ("shared-volume/job.yaml", "Qwen/Qwen2.5-0.5B-Instruct", "tokenizer.json"),
    ],
)
def test_a_pull_without_a_daemon_puts_the_model_where_its_readers_look(
    file: str, repository: str, name: str, tmp_path: Path
) -> None:
    (pod,) = all_pods(file)
    pull = containers(pod)[0]
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)  # as the kubelet makes an emptyDir
    arguments = [str(volume) if word in ("/volume", "/models") else word for word in pull["args"]]
    environment = {variable["name"]: variable["value"] for variable in pull["env"]}
    with Hub() as hub:
        hub.add(repository, {name: b"weights", "config.json": b"{}"})
        environment |= {
            "CACHD_HF_ENDPOINT": hub.url,
            "CACHD_ALLOW": '["127.0.0.0/8"]',
            "CACHD_RESERVE_FREE": "0",
        }
        ended = subprocess.run(
            [sys.executable, "-m", "cachd", *arguments],
            env={**os.environ, **environment},
            cwd=BASE.parent,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    model = pull["args"][pull["args"].index("--name") + 1]
    assert (volume / "cachd/models" / model / name).read_bytes() == b"weights"
    for reader in pod["containers"]:
        for word in reader["args"] if reader is not pull else []:
            if word.startswith("/cache/"):
                assert (volume / "cachd" / word.removeprefix("/cache/")).exists()


def test_the_storage_container_of_kserve_links_the_files_of_one_snapshot(tmp_path: Path) -> None:
    (document,) = documents((EXAMPLES / "kserve/storage-container.yaml").read_text())
    container = document["spec"]["container"]
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "models").mkdir()
    with DiskStore(tmp_path / "cache") as store:
        publish(store, {"config.json": b"{}", "sub/model.bin": b"weights"}, name="qwen-instruct")
        script = script_of(container).replace("/cache", str(tmp_path / "cache"))
        called = ["cachd://qwen-instruct", str(tmp_path / "models")]
        command = ["sh", "-ec", script, "storage-initializer", *called]
        ended = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "models/sub/model.bin").read_bytes() == b"weights"
    assert ".trees" in str((tmp_path / "models/config.json").readlink())


def test_kserves_uri_names_the_model_that_is_held() -> None:
    (service,) = documents((EXAMPLES / "kserve/inference-service.yaml").read_text())
    (hold,) = service["spec"]["predictor"]["initContainers"]
    assert service["spec"]["predictor"]["model"]["storageUri"] == f"cachd://{hold['args'][1]}"
    (container,) = documents((EXAMPLES / "kserve/storage-container.yaml").read_text())
    assert container["spec"]["supportedUriFormats"] == [{"prefix": "cachd://"}]
    assert container["spec"]["container"]["name"] == "storage-initializer"
