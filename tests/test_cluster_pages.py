"""What the pages about clusters tell to run and to apply: shell that parses, commands and fields that exist.

They need a cluster, so they are not run here, unlike the commands of all other pages (tests/test_readme.py).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml

from docs import chart
from tests.test_daemonset import DAEMON_POD, NEWEST, validate
from tests.test_readme import OF_A_CLUSTER, PAGES

COMMANDS = {
    name: set(re.findall(r"`(--[\w-]+)", text))
    for name, text in re.findall(
        r"^### cachd ([a-z-]+)(.*?)(?=^### )", PAGES["commands.md"] + "### ", re.MULTILINE | re.DOTALL
    )
}


def blocks(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return found


@pytest.mark.parametrize("page", OF_A_CLUSTER)
def test_the_shell_of_the_page_parses(page: str) -> None:
    for block in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=block, check=True, text=True)


@pytest.mark.parametrize("page", OF_A_CLUSTER)
def test_the_commands_of_cachd_on_the_page_exist_with_their_flags(page: str) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    called = [found[1] for line in lines if (found := re.search(r"(?:-- cachd|^c) ([a-z][^#|&]*)", line))]
    assert called
    for command in called:
        name, *words = shlex.split(command)
        flags = {word for word in words if word.startswith("--")}
        assert {flag.replace("--no-", "--") for flag in flags} <= COMMANDS[name], command


def test_what_the_page_adds_to_the_daemons_pod_passes_the_strict_schema() -> None:
    parts: dict[str, Any] = {}
    for block in blocks("kubernetes.md", "yaml"):
        document = yaml.safe_load(block)
        if "kind" in document:
            validate(document, NEWEST)
            assert document["rules"] == [
                {"apiGroups": [""], "resources": ["nodes/configz"], "verbs": ["get"]}
            ]
        else:
            parts |= document
    assert parts.keys() == {"initContainers", "env", "affinity", "nodeSignals"}
    (daemon,) = DAEMON_POD["containers"]
    pod = {**DAEMON_POD, "initContainers": parts["initContainers"], "affinity": parts["affinity"]}
    assert parts["nodeSignals"].keys() <= yaml.safe_load(chart.VALUES.read_text())["nodeSignals"].keys()
    pod["containers"] = [{**daemon, "env": [*daemon["env"], *parts["env"]]}]
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cachd"}, "spec": pod}, NEWEST)
