"""The parts of `make test-kube` that need no node: it runs what the project ships and its pages say."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.kube import __main__ as kube
from tests.kube import changes, models, programs
from tests.kube.cases import CASES, Verdict, table
from tests.kube.cluster import NEWER, adapt, blocks_of_readme, page
from tests.kube.image import ENGINE, digest
from tests.kube.namespaces import SETTINGS, Machine
from tests.kube.pages import asking, blocks_of_page
from tests.kube.processes import Processes, until
from tests.kube.serving import configure, running_to_ready
from tests.test_examples import WRAPPERS

DAEMONSET = programs.PROJECT / "daemonset"
NOTHING = Machine(frozenset(), frozenset(), frozenset(), frozenset(), dict.fromkeys(SETTINGS, "0"))


def leaves(document: Any, at: str = "") -> dict[str, Any]:
    """Every value of a document by its path."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found: dict[str, Any] = {}
    for key, value in items:
        here = f"{at}/{key}"
        found |= leaves(value, here) if isinstance(value, dict | list) and value else {here: value}
    return found


def test_the_pod_of_the_cases_is_that_of_the_example_but_for_its_image_and_resources() -> None:
    example = leaves(yaml.safe_load(models.WRAPPER.read_text()))
    ours = leaves(models.consumer())
    differ = {path for path in example.keys() | ours.keys() if example.get(path) != ours.get(path)}
    assert {path for path in differ if "/resources/" not in path} == {
        "/spec/template/spec/containers/0/image"
    }
    assert str(models.WRAPPER.relative_to(DAEMONSET / "examples")) in WRAPPERS


def test_the_model_of_the_cases_is_the_one_that_the_example_waits_for() -> None:
    text = models.WRAPPER.read_text()
    assert f"value: {models.QWEN['name']}\n" in text
    config = yaml.safe_load((DAEMONSET / "configmap.yaml").read_text())["data"]["config.yaml"]
    (listed,) = yaml.safe_load(config)["models"]
    assert (listed["ref"], listed["name"]) == (models.QWEN["ref"], models.QWEN["name"])


def test_only_what_the_old_version_lacks_is_taken_out_of_the_manifests(tmp_path: Path) -> None:
    shutil.copytree(DAEMONSET, tmp_path / "daemonset")
    adapt(tmp_path / "daemonset")
    removed = set()
    for file in DAEMONSET.rglob("*.yaml"):
        adapted = (tmp_path / "daemonset" / file.relative_to(DAEMONSET)).read_text()
        lines = difflib.ndiff(file.read_text().splitlines(), adapted.splitlines())
        removed |= {line[2:].strip() for line in lines if line.startswith("- ")}
    assert removed == NEWER.keys()


def test_an_option_is_changed_in_the_configuration_of_a_manifest(tmp_path: Path) -> None:
    shutil.copy(DAEMONSET / "configmap.yaml", tmp_path)
    before = yaml.safe_load((tmp_path / "configmap.yaml").read_text())
    configure(tmp_path / "configmap.yaml", allow=["10.0.0.1/32"])
    after = yaml.safe_load((tmp_path / "configmap.yaml").read_text())
    options = [yaml.safe_load(each["data"].pop("config.yaml")) for each in (before, after)]
    assert before == after
    assert options[1] == {**options[0], "allow": ["10.0.0.1/32"]}


def test_the_commands_of_the_page_are_the_ones_that_the_cases_run() -> None:
    assert changes.APPLY == "kubectl -n cachd apply -f configmap.yaml"
    assert changes.ANNOTATE.startswith("kubectl -n cachd annotate pods ")
    assert len(page("docs/kubernetes.md", "Is a model ready?")) == 2
    assert len(page("docs/kubernetes.md", "Two daemons on one node")) == 1
    assert sum("kubectl apply -k daemonset\n" in block for block in blocks_of_readme()) == 1


def test_the_pod_that_asks_has_the_environment_of_the_page_and_no_rights() -> None:
    (container,) = asking()["spec"]["containers"]
    assert {each["name"] for each in container["env"]} == {"NODE_IP", "CACHD_URL"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_case_of_the_page_does_something_for_each_of_its_blocks() -> None:
    blocks = blocks_of_page()
    assert {language for language, _ in blocks} == {"sh", "yaml"}
    described = [yaml.safe_load(text).keys() for language, text in blocks if language == "yaml"]
    for part in ("initContainers", "env", "nodeSignals", "affinity", "kind"):
        assert sum(part in keys for keys in described) == 1, part
    assert len(described) == 5
    assert sum("kubectl label nodes" in text for _, text in blocks) == 1


def test_the_readme_installs_with_one_line_after_the_image_and_one_secret() -> None:
    (block,) = [block for block in blocks_of_readme() if "helm install" in block]
    build, install, secret = block.splitlines()
    assert build.startswith("docker build -t registry.example.com/cachd:")
    assert "--set image.repository=registry.example.com/cachd" in install
    assert secret.startswith("kubectl -n cachd create secret generic cachd ")


def test_the_pods_of_the_page_of_pods_hold_by_its_own_words() -> None:
    pod = models.plain_consumer("qwen")["spec"]["template"]["spec"]
    containers = [*pod["initContainers"], *pod["containers"]]
    assert {each["image"] for each in containers} == {ENGINE}, "no container has cachd"
    text = (programs.PROJECT / "docs/pods.md").read_text()
    assert all(each["command"][-1] in text for each in containers)
    assert all({"name": "MODEL", "value": "qwen"} in each["env"] for each in containers)
    (holds,) = models.held_by_cachd("qwen")["spec"]["containers"]
    assert f"cachd {' '.join(holds['args'][:5])}" in re.sub(r"\s+", " ", text)


def test_the_pod_of_the_claim_has_the_one_that_the_chart_makes() -> None:
    pod = models.consumer(models.RESTRICTED)["spec"]["template"]["spec"]
    (cache,) = [each for each in pod["volumes"] if each["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "cachd", "readOnly": True}


def test_a_row_says_what_held_or_why_it_did_not(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = list(CASES)[:2]
    verdicts = [Verdict(first, "7 s", "", 61.4), Verdict(second, "", "TimeoutError: [x] in vain", 3.0)]
    Console(width=400).print(table(verdicts))
    _, _, _, held, failed, *_ = capsys.readouterr().out.splitlines()
    assert [each.strip() for each in held.strip("│").split("│")] == [first, CASES[first].holds, "7 s", "61"]
    assert f"NOT: {CASES[second].holds}: TimeoutError: [x] in vain" in failed


def test_the_cases_are_listed_without_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert kube.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in listed] == list(CASES)


def test_a_machine_that_lacks_something_says_so_in_one_line() -> None:
    script = "from tests.kube.programs import lacking, unbuilt; print(unbuilt()); print(lacking())"
    bare = {**os.environ, "PATH": "/nowhere", "CACHD_KUBE": "/nowhere"}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=programs.PROJECT, env=bare, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    unbuilt, lacking = ended.stdout.splitlines()
    assert unbuilt.startswith("not in /nowhere: kube-apiserver, ")
    assert re.match("it needs (root|Debian): ", lacking)


@pytest.mark.parametrize(
    "text",
    [
        "Types: deb\n# a comment\nURIs: https://mirror.example/debian\nSuites: bookworm\n",
        "# deb https://old.example/debian stable main\ndeb https://mirror.example/debian bookworm main\n",
        "deb [signed-by=/a.gpg arch=amd64] https://mirror.example/debian bookworm main\n",
    ],
)
def test_the_mirror_is_the_one_that_apt_uses(text: str) -> None:
    assert programs.first_mirror(["", text]) == "https://mirror.example/debian"
    with pytest.raises(LookupError, match="no mirror"):
        programs.first_mirror(["", "deb cdrom:[disc]/ bookworm main\n"])


def test_an_image_is_built_anew_when_a_file_changes_but_not_for_bytecode() -> None:
    engine = programs.PROJECT / "tests/kube/engine"
    before = digest([engine, "text"])
    assert before != digest([engine, "other text"])
    assert before != digest([engine / "vllm", "text"])
    compiled = engine / "__pycache__"
    compiled.mkdir()
    try:
        (compiled / "vllm.pyc").write_bytes(b"compiled")
        assert digest([engine, "text"]) == before
    finally:
        shutil.rmtree(compiled)


@pytest.mark.parametrize("kind", ["mounts", "interfaces", "disks", "cgroups"])
def test_what_is_left_behind_is_named(kind: str, tmp_path: Path) -> None:
    now = Machine(**{**vars(NOTHING), kind: frozenset({"left"})})
    assert now.left_since(NOTHING, tmp_path) == [f"{kind} left"]
    assert now.left_since(now, tmp_path) == []
    changed = replace(NOTHING, settings={**NOTHING.settings, "kernel/panic": "10"})
    assert changed.left_since(NOTHING, tmp_path) == ["setting kernel/panic"]


def test_a_process_that_was_left_behind_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(["tail", "-f", "/dev/null", str(tmp_path)], stderr=subprocess.DEVNULL) as left:
        until(lambda: NOTHING.left_since(NOTHING, tmp_path), "it runs")
        assert f"process {left.pid}" in NOTHING.left_since(NOTHING, tmp_path)[0]
        left.kill()


def test_a_program_of_the_ground_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    def ended() -> str:
        try:
            processes.check()
        except RuntimeError as error:
            return str(error)
        return ""

    with Processes(tmp_path) as processes:
        processes.start("stays", "tail", "-f", "/dev/null")
        processes.start("ends", "sh", "-c", "echo why; exit 3")
        assert until(ended, "it has ended") == "ends ended with 3:\nwhy\n"
        stays = processes.running["stays"]
    assert stays.poll() is not None


def test_a_wait_in_vain_names_what_it_waited_for() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="in vain: the moon"):
        until(lambda: None, "the moon", seconds=0)
    assert time.monotonic() - begun < 60


def test_the_time_from_running_to_ready_is_that_of_the_daemons_container() -> None:
    pod = {
        "status": {
            "containerStatuses": [{"state": {"running": {"startedAt": "2026-01-01T00:00:01Z"}}}],
            "conditions": [{"type": "Ready", "lastTransitionTime": "2026-01-01T00:00:04Z"}],
        }
    }
    assert running_to_ready(pod) == 3
