"""Daemons that a real Prometheus watches while they do all that the dashboard shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ground.hub import Hub
from tests.ground.hub_client import get
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Flip, Origin, Reset, Status
from tests.ground.origin.certificates import certify
from tests.ground.prometheus import Prometheus
from tests.ground.site import MIB, Ground, until

GPU_1, GPU_2 = "gpu-1", "gpu-2"
PLENTY = {"bytes_per_second": 32 * MIB}


@dataclass(frozen=True, slots=True)
class Watched:
    """A Prometheus and the daemons that it scrapes, by the label `instance`."""

    prometheus: Prometheus
    grounds: dict[str, Ground]


@contextmanager
def watched(place: Path, *instances: str, every: str = "1s") -> Iterator[Watched]:
    """Daemons that were scraped before, while and after they did everything. Takes ten seconds and more."""
    certify(place / "tls.pem")
    with Origin() as origin, Hub() as hub, ExitStack() as stack:
        options = {
            "listen": ["127.0.0.1:0 plain", "127.0.0.1:0"],
            "tls_cert_file": str(place / "tls.pem"),
            "retries": 3,
            "limit_bytes": "36MiB",
            "limit_bytes_per_second": "32MiB",
            "evict": False,
            "hf_endpoint": hub.url,
            "hub_listen": "127.0.0.1:0",
        }
        nodes = {name: stack.enter_context(Node(place / name, options)) for name in instances}
        grounds = {name: Ground(node, origin, hub) for name, node in nodes.items()}
        for ground in grounds.values():
            ground.have("kept.bin")
            ground.node.stop()
            ground.node.start()  # a start looks at all blobs: from then on, their verification has an age
        prometheus = stack.enter_context(Prometheus(place / "prometheus", nodes, every=every))
        prometheus.wait_for_scrapes(1)
        for ground in grounds.values():
            with ground.held("held.bin"):
                _everything(ground, prometheus)
                prometheus.wait_for_scrapes(2)
        yield Watched(prometheus, grounds)


def _everything(ground: Ground, prometheus: Prometheus) -> None:
    """Let a daemon pull, hit, evict, find damage, fail and be asked, beside a pull that is held."""
    node, origin = ground.node, ground.origin
    assert node.ready("held.bin", wait=0).status == 503
    node.pull(f"{origin.url}/kept.bin")
    node.ask("PUT", "/v1/limits", {"bytes_per_second": MIB})
    node.pull(ground.add("slow.bin", 24 * MIB))
    until(lambda: node.metric("cachd_pull_eta_seconds", model="slow.bin"))
    prometheus.wait_for_scrapes(1)
    node.ask("PUT", "/v1/limits", PLENTY)
    assert node.ready("slow.bin").status == 200
    content = noise(MIB, seed=50)
    origin.fault("/wrong.bin", Flip(5), times=1)
    node.pull(f"{origin.add('/wrong.bin', content)}#sha256={hashlib.sha256(content).hexdigest()}")
    assert node.ready("wrong.bin").status == 200
    origin.fault("/again.bin", Reset(at=0), times=1, when=lambda asked: asked.method == "GET")
    ground.have("again.bin")
    origin.fault("/none.bin", Status(404))
    node.pull(f"{origin.url}/none.bin", name="none")
    assert node.ready("none").status == 404
    node.pull(origin.add("/large.bin", noise(37 * MIB)))
    assert node.ready("large.bin").status == 413
    ground.hub.add("org/model", {"config.json": b"{}"})
    assert get(node, "/org/model/resolve/main/config.json").body == b"{}"
    node.ask("POST", "/v1/models/kept.bin/leases", {"seconds": 600})
    node.ask("POST", "/v1/models/kept.bin/verify")
    node.wait_for("verified", name="kept.bin")
    until(lambda: node.metric("cachd_scrub_oldest_timestamp_seconds"))
    room = node.ask("GET", "/v1/capacity").document["available_bytes"]
    assert node.ask("POST", "/v1/evictions", {"bytes": room + MIB // 4}).status == 200
