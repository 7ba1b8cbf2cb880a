"""Tries clients on both views and on the Hub endpoint, as root and as another user."""

from __future__ import annotations

import functools
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.model import ModelSpec
from cachd.pod.recipe import ENGINES, Recipe
from tests.conformance import endpoint
from tests.conformance.clients import ENDPOINT, LAYOUTS, OFFLINE, ONLINE, PLAIN, Client
from tests.conformance.endpoint import Ended
from tests.conformance.kept import USERS, Cell
from tests.ground.hub import Hub
from tests.ground.pod import pod, run_in_pod

PROGRAMS = Path(__file__).parent / "programs"
_PATIENCE_SECONDS = 1800
_LONGEST_FAILURE = 300
# What a program prints at its end: the nanoseconds for which its main thread ran, and was ready to run
# (/proc/pid/schedstat). Nothing if it waited for programs that it started.
_SCHEDSTAT = """
import resource
if resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime < 0.5:
    print("schedstat", open("/proc/self/schedstat").read())
"""


@dataclass(frozen=True, slots=True)
class Field:
    """A root with models, and the Hub that they came from."""

    root: Path
    hub: Hub

    def tried(self, client: Client, python: str, view: str, case: str, user: str) -> Cell:
        """Load the client's model in a pod. Raises PodRefused."""
        output, seconds = "", 0.0
        try:
            ended, seconds = self._ran(client, python, view, case, USERS[user])
            last = ended.stderr.strip().splitlines()[-1:] or [f"status {ended.returncode}"]
            failure = last[0][-_LONGEST_FAILURE:] if ended.returncode else ""
            output = ended.stdout
        except subprocess.TimeoutExpired:
            failure = f"not ended after {_PATIENCE_SECONDS} s"
        except endpoint.NotAsPromised as error:
            failure = str(error)[-_LONGEST_FAILURE:]
        return Cell(view, case, user, round(seconds, 1), round(_waited(output, seconds), 1), failure)

    def _ran(self, client: Client, python: str, view: str, case: str, uid: int) -> Ended:
        """The ended program, and the seconds from its start to its end."""
        env = self.environment(client, view, case)
        script = (PROGRAMS / f"{client.program}.py").read_text() + _SCHEDSTAT
        if view != ENDPOINT:
            began, online = time.monotonic(), case == ONLINE
            run = functools.partial(run_in_pod, timeout=_PATIENCE_SECONDS, network=online)
            return run(self.root, script, env=env, uid=uid, python=python), time.monotonic() - began

        def started(empty: Path, variables: dict[str, str]) -> AbstractContextManager[Popen[str]]:
            return pod(empty, script, env={**env, **variables}, uid=uid, python=python)

        return endpoint.ran(self.hub, client, case, started, _PATIENCE_SECONDS)

    def environment(self, client: Client, view: str, case: str) -> dict[str, str]:
        """The variables of a trial: those of `cachd env`, and what the program needs to know.

        Only an offline trial has HF_HUB_OFFLINE. Without a network, the Hub cannot be reached. A client of
        the endpoint has a cache of its own.
        """
        printed = recipe(client)
        env = {**printed.env, **client.more}
        if case != OFFLINE:
            env["HF_HUB_OFFLINE"] = "0"
        if view == ENDPOINT:
            env["HF_HUB_CACHE"] = "$SCRATCH/huggingface/hub"
        return env | {
            "MODEL": f"{printed.link}/{printed.name}" if view == PLAIN else client.model,
            "NETWORK": case,
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **_command(client, printed, view),
        }


def _waited(output: str, seconds: float) -> float:
    """For how long a program neither ran nor could have run on a quieter machine; 0 if that is unknown."""
    found = re.fullmatch(r"schedstat (\d+) (\d+) \d+", output.strip().rpartition("\n")[2])
    return max(0.0, seconds - (int(found[1]) + int(found[2])) / 1e9) if found else 0.0


def recipe(client: Client) -> Recipe:
    """What `cachd env` prints for the client's model. "$CACHE" and "$SCRATCH" are directories of the pod."""
    name = client.model.replace("/", "--")
    return Recipe(client.engine, name, client.file, cache="$CACHE", link="$CACHE/models", scratch="$SCRATCH")


def _command(client: Client, printed: Recipe, view: str) -> Mapping[str, str]:
    """The command of an engine that is a server, with a port that is free."""
    port = ENGINES[client.engine].port
    if port is None:
        return {}
    words = [*printed.command, *printed.args, *client.more_words]
    if view != PLAIN:
        words[words.index(printed.path)] = client.model
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    run = shlex.join(free if word == str(port) else word for word in words)
    return {"RUN": run, "PORT": free, "ASK": client.more.get("ASK", printed.name)}


@contextmanager
def field(root: Path, models: Mapping[str, Mapping[str, bytes | Path]]) -> Iterator[Field]:
    """A root into which an engine has pulled these models, by repository, from a Hub that is still there."""
    with Hub() as hub:
        with assembled(
            Config(root=root, hf_endpoint=hub.url, allow=("127.0.0.0/8",), reserve_free=0)
        ) as engine:
            for repo, files in models.items():
                hub.add(repo, dict(files))
                running = engine.pulls.start(ModelSpec.asked(f"hf://{repo}", layout=LAYOUTS.get(repo)))
                assert running is not None
                running.done.result(_PATIENCE_SECONDS)
        yield Field(root, hub)
