"""A node that runs the real daemon in a process of its own: started, asked, stopped, killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from tests.ground.program import CACHD, Program, run

PATIENCE_SECONDS = 120.0
_READ_ONLY_MODES = 0o755


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the API: status, document (bytes where it is no JSON) and headers."""

    status: int
    document: Any
    headers: Mapping[str, str]


def short_name(ref: str) -> str | None:
    """What tests call a model: its repository on the Hub, the last part of its ref elsewhere."""
    scheme, _, rest = ref.partition("#")[0].partition("://")
    if scheme == "hf":
        return rest.partition("@")[0].replace("/", "--")
    return rest.rstrip("/").rpartition("/")[2] or None


class Node:
    """The daemon over one root. `options` are keys of its configuration file.

    A context manager that leaves no process behind; `kill` and `start` may follow each other inside.
    `before` are the words of a command that runs another, such as prlimit; `program` those of cachd itself.
    """

    def __init__(
        self,
        root: Path,
        options: Mapping[str, Any] | None = None,
        *,
        before: Sequence[str] = (),
        program: Sequence[str] = CACHD,
        **env: str,
    ) -> None:
        self.root = root
        self.program = program
        self.config = root.parent / f"{root.name}.yaml"
        plain = {"allow": ["127.0.0.0/8"], "listen": "127.0.0.1:0", "reserve_free": 0}
        self.options = {**plain, **(options or {})}
        self.log: list[dict[str, Any]] = []
        self.output = ""
        self._before, self._env = before, env
        self._logged = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._address = ("", 0)

    def __enter__(self) -> Self:
        self.root.mkdir(mode=_READ_ONLY_MODES, exist_ok=True)
        self.root.chmod(_READ_ONLY_MODES)
        self.configure(**self.options)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()

    @property
    def url(self) -> str:
        return f"http://{self._address[0]}:{self._address[1]}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def configure(self, **options: Any) -> None:
        """Write the configuration file, in one step for the daemon that reads it."""
        self.options = options
        beside = self.config.with_suffix(".new")
        beside.write_text(yaml.safe_dump(options))
        beside.replace(self.config)

    def start(self, *, until: str = "listening") -> None:
        """Start the daemon and wait until it listens, or logs another event with its address."""
        command = [
            *self._before,
            *(*self.program, "serve"),
            *("--root", str(self.root), "--config", str(self.config)),
        ]
        env = {**os.environ, "CACHD_LOG_FORMAT": "json", "CACHD_LOG_LEVEL": "debug", **self._env}
        self._process = Program(command, stderr=subprocess.PIPE, env=env)
        with self._logged:
            self.log.clear()
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()
        found = self.wait_for(until)
        self._address = (found.get("host", ""), found.get("port", 0))

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to stop; its exit status."""
        return self._end(signal.SIGTERM)

    def wait_for(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first log event with this name and these facts, waited for."""

        def found() -> dict[str, Any] | None:
            for entry in self.log:
                if entry.get("event") == event and facts.items() <= entry.items():
                    return entry
            return {} if self._process is None or self._process.poll() is not None else None

        with self._logged:
            self._logged.wait_for(lambda: found() is not None, PATIENCE_SECONDS)
            entry = found()
        if not entry:
            raise AssertionError(f"the daemon logged no {event!r} {facts}:\n{self.output[-4000:]}")
        return entry

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own. A `body` that is no bytes goes as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        said = {"Content-Type": "application/json"} if content is not None else {}
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, content, {**said, **(headers or {})})
            response = connection.getresponse()
            got = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return Answer(response.status, json.loads(got) if is_json else got, dict(response.getheaders()))

    def pull(self, ref: str, **asked: Any) -> Answer:
        """Ask for a model, under a short name where the test gives none."""
        return self.ask("POST", "/v1/models", {"ref": ref, "name": short_name(ref), **asked})

    def ready(self, name: str, *, wait: float = PATIENCE_SECONDS) -> Answer:
        return self.ask("GET", f"/v1/models/{name}/ready?wait={wait}")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 when there is none."""
        text = self.ask("GET", "/metrics").document.decode()
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def cli(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this node."""
        said = {**os.environ, "CACHD_SERVER": self.url, **env}
        return run([*self.program, *arguments], env=said, timeout=PATIENCE_SECONDS)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._logged:
                self.output += line
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.log.append({"event": line.rstrip()})
                self._logged.notify_all()
        process.wait()  # only then does its end show to who waits for an event
        with self._logged:
            self._logged.notify_all()

    def _end(self, number: int) -> int:
        assert self._process is not None
        assert self._reader is not None
        process, self._process = self._process, None
        process.send_signal(number)
        status = process.wait(PATIENCE_SECONDS)
        self._reader.join()
        assert process.stderr is not None
        process.stderr.close()
        return status
