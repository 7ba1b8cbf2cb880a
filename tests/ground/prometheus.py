"""A real Prometheus that scrapes daemons and evaluates the alerts; it needs `prometheus`."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import yaml

from tests.ground.node import Node
from tests.ground.s3 import LOOPBACK, free_ports

PROJECT = Path(__file__).parent.parent.parent
RULES = PROJECT / "daemonset/monitoring/rules.yaml"
JOB = "cachd"
PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.1


class QueryRefused(Exception):
    """Prometheus refused a query; what it said."""


class Prometheus:
    """A Prometheus of its own, which scrapes as often as `every` says. A context manager."""

    def __init__(self, place: Path, nodes: Mapping[str, Node], *, every: str = "1s") -> None:
        """`place`: an absent directory for its data; `nodes`: by the name that `instance` shows."""
        self._place, self._nodes, self._every = place, nodes, every
        (self._port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        self.began = time.time()

    def __enter__(self) -> Self:
        self._place.mkdir()
        config = self._place / "prometheus.yaml"
        config.write_text(yaml.safe_dump(self._config()))
        words = [
            str(shutil.which("prometheus")),
            *(f"--config.file={config}", f"--storage.tsdb.path={self._place / 'data'}"),
            *(f"--web.listen-address={LOOPBACK}:{self._port}", "--log.level=warn"),
        ]
        with open(self._place / "log", "wb") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _config(self) -> dict[str, Any]:
        targets = [
            {"targets": [node.url.removeprefix("http://")], "labels": {"instance": name}}
            for name, node in self._nodes.items()
        ]
        paces = ("scrape_interval", "scrape_timeout", "evaluation_interval")
        return {
            "global": dict.fromkeys(paces, self._every),
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
        }

    def wait_for_scrapes(self, count: int) -> None:
        """Return when every node answered `count` more scrapes. The first scrape takes five seconds."""
        before = self._scrapes()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(self._scrapes().get(name, 0) >= before.get(name, 0) + count for name in self._nodes):
            if time.monotonic() > deadline:
                raise AssertionError(f"too few scrapes:\n{(self._place / 'log').read_text()[-4000:]}")
            time.sleep(_POLL_SECONDS)

    def _scrapes(self) -> dict[str, float]:
        try:
            found = self.query(f'sum by (instance) (sum_over_time(up{{job="{JOB}"}}[1h]))')
        except (OSError, http.client.HTTPException, QueryRefused):  # it has only been started
            return {}
        return {each["metric"]["instance"]: float(each["value"][1]) for each in found}

    def query(self, query: str, *, at: float | None = None) -> list[Any]:
        """The series of an instant query, now or at a Unix time. Raises QueryRefused."""
        found: list[Any] = self._ask("query", query=query, time=at or time.time())["result"]
        return found

    def over_all(self, query: str, *, until: float | None = None) -> list[Any]:
        """The series of a query at each second from the start to a Unix time, or now. Raises QueryRefused."""
        ended = until or time.time()
        answer = self._ask("query_range", query=query, start=self.began, end=ended, step=1)
        found: list[Any] = answer["result"]
        return found

    def rules(self) -> Iterable[Mapping[str, Any]]:
        """The alerts as they were last evaluated."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def _ask(self, what: str, **words: object) -> Any:
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("GET", f"/api/v1/{what}?{urlencode(words)}")
            said = connection.getresponse().read()
        finally:
            connection.close()
        try:
            answer = json.loads(said)
        except ValueError:
            raise QueryRefused(said.decode(errors="replace")) from None
        if answer["status"] != "success":
            raise QueryRefused(answer["error"])
        return answer["data"]
