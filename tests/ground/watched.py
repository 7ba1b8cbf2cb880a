"""A daemon that a real Prometheus watches while it does all that the dashboard shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Flip, Origin, Reset, Status
from tests.ground.origin.certificates import certify
from tests.ground.prometheus import Prometheus
from tests.ground.site import Ground, until

MIB = 1 << 20
GPU_1 = "gpu-1"


@contextmanager
def watched(place: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped `GPU_1` before, while and after it did everything. Takes ten seconds."""
    certify(place / "tls.pem")
    options = {
        "listen": ["127.0.0.1:0 plain", "127.0.0.1:0"],
        "tls_cert_file": str(place / "tls.pem"),
        "retries": 3,
        "limit_bytes": "16MiB",
        "limit_bytes_per_second": "1GiB",
        "evict": False,
    }
    with Origin() as origin, Hub() as hub, Node(place / "node", options | {"hf_endpoint": hub.url}) as node:
        ground = Ground(node, origin, hub)
        ref = ground.have("kept.bin")
        node.stop()
        node.start()  # a start looks at all blobs: from then on, the age of their verification is known
        with Prometheus(place / "prometheus", {GPU_1: node}) as prometheus:
            with ground.held("held.bin"):
                prometheus.wait_for_scrapes(1)
                _everything(ground, ref)
                prometheus.wait_for_scrapes(3)
            yield prometheus


def _everything(ground: Ground, ref: str) -> None:
    """Let a daemon pull, hit, evict, find damage, fail and be asked, beside a pull that is held."""
    node, origin = ground.node, ground.origin
    node.pull(ref)
    content = noise(MIB, seed=50)
    origin.fault("/wrong.bin", Flip(5), times=1)
    node.pull(f"{origin.add('/wrong.bin', content)}#sha256={hashlib.sha256(content).hexdigest()}")
    assert node.ready("wrong.bin").status == 200
    origin.fault("/again.bin", Reset(at=0), times=1, when=lambda asked: asked.method == "GET")
    ground.have("again.bin")
    origin.fault("/none.bin", Status(404))
    node.pull(f"{origin.url}/none.bin", name="none")
    assert node.ready("none").status == 404
    node.pull(origin.add("/large.bin", noise(17 * MIB)))
    assert node.ready("large.bin").status == 413
    node.ask("POST", "/v1/models/kept.bin/leases", {"seconds": 600})
    node.ask("POST", "/v1/models/kept.bin/verify")
    node.wait_for("verified", name="kept.bin")
    until(lambda: node.metric("cachd_scrub_oldest_timestamp_seconds"))
    room = node.ask("GET", "/v1/capacity").document["available_bytes"]
    assert node.ask("POST", "/v1/evictions", {"bytes": room + MIB // 4}).status == 200
