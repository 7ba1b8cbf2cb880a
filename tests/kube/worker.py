"""The node: containerd, kubelet and kube-proxy, and a disk that the cache shares with the kubelet."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from tests.kube.image import PAUSE
from tests.kube.processes import Processes, run, until
from tests.kube.programs import CNI, found

NODE, ADDRESS, BRIDGE = "node-1", "10.99.0.1", "cachd-node"
PODS, POD_BRIDGE = "10.244.0.0/24", "cachd-pods"
SERVICES = "10.96.0.0/24"  # the addresses of Services
CACHE = Path("/var/lib/cachd")  # as pods mount it
STATE, SOCKET = Path("/run/containerd"), "/run/containerd/containerd.sock"
DISK_BYTES = 3 << 30
CGROUPS = "kubepods"


class Worker:
    """One node of the cluster. It is started when it is made, and its programs belong to `processes`."""

    def __init__(self, place: Path, kubeconfig: Path, processes: Processes, images: Sequence[Path]) -> None:
        self.disk = place / "disk"
        self._place, self._kubeconfig, self._processes, self._images = place, kubeconfig, processes, images
        self._make_disk()
        self._write_files()
        self.start()

    def start(self) -> None:
        """Start what runs on the node, and import the images."""
        self._processes.start("containerd", "containerd", "--config", str(self._place / "containerd.toml"))
        until(lambda: (self._processes.check(), self._answers())[1], "containerd answers")
        self.import_images()
        self._processes.start(
            "kubelet",
            found("kubelet") or "",
            *(f"--config={self._place}/kubelet.yaml", f"--kubeconfig={self._kubeconfig}"),
            *(f"--hostname-override={NODE}", f"--node-ip={ADDRESS}", f"--root-dir={self.disk}/kubelet"),
            *("--container-runtime=remote", f"--container-runtime-endpoint=unix://{SOCKET}"),
            *(f"--cert-dir={self._place}/kubelet-certificates", "-v=2"),
        )
        self._processes.start(
            "kube-proxy", found("kube-proxy") or "", f"--config={self._place}/kube-proxy.yaml"
        )

    def import_images(self) -> None:
        """Put the images there that are not: the kubelet deletes images, too, when its disk fills."""
        listed = self.ctr("images", "ls", "-q").split()
        for archive in self._images:
            if not any(archive.stem.rpartition("-")[0] in name for name in listed):
                self.ctr("images", "import", str(archive))

    def power_cut(self) -> None:
        """Kill everything that runs on the node, at once. What is left is what its disks have."""
        for name in ("kubelet", "kube-proxy", "containerd"):
            self._processes.kill(name)
        for process in self.pods():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until(lambda: not self.pods(), "every process of a pod has ended")
        _unmount_below(STATE)
        _unmount_below(Path("/run/netns"))
        shutil.rmtree(STATE, ignore_errors=True)

    def pods(self) -> list[int]:
        """The processes of pods, and the shims that keep them."""
        found_here = []
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (directory / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                words = (directory / "cmdline").read_bytes()
                if b"containerd-shim" in words or f"/{CGROUPS}/" in (directory / "cgroup").read_text():
                    found_here.append(int(directory.name))
        return found_here

    def kill_in(self, container: str) -> None:
        """kill -9 of a container's first process, by the container's id."""
        tasks = self.ctr("tasks", "ls")
        (process,) = re.findall(rf"^{container}\s+(\d+)", tasks, re.MULTILINE)
        os.kill(int(process), signal.SIGKILL)

    def ctr(self, *words: str) -> str:
        """What containerd's own client prints, in the namespace of the kubelet."""
        return run("ctr", "--address", SOCKET, "--namespace", "k8s.io", *words)

    def _answers(self) -> bool:
        try:
            return bool(self.ctr("version"))
        except RuntimeError:
            return False

    def _make_disk(self) -> None:
        """A disk that fills as a node's does: the kubelet's directory is on it, and the cache."""
        image = self._place / "disk.img"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-m", "0", image)
        self.disk.mkdir()
        run("mount", "-o", "loop", image, self.disk)
        (self.disk / "cachd").mkdir()
        CACHE.mkdir(exist_ok=True)
        run("mount", "--bind", self.disk / "cachd", CACHE)

    def _write_files(self) -> None:
        (self._place / "containerd.toml").write_text(containerd_config(self._place))
        (self._place / "cni").mkdir()
        (self._place / "cni/10-pods.conflist").write_text(json.dumps(network(self._place)))
        (self._place / "kubelet.yaml").write_text(yaml.safe_dump(kubelet_config(self._place)))
        (self._place / "kube-proxy.yaml").write_text(yaml.safe_dump(proxy_config(self._kubeconfig)))


def make_networks() -> None:
    """The loopback, an address of the node that pods reach, and a route to the addresses of Services.

    Where there is no default route, the kernel refuses these addresses before kube-proxy's rules see them.
    """
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{ADDRESS}/32", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    run("ip", "route", "add", SERVICES, "dev", BRIDGE)


def containerd_config(place: Path) -> str:
    absent = ", ".join(
        f'"io.containerd.snapshotter.v1.{name}"' for name in ("btrfs", "zfs", "aufs", "devmapper")
    )
    return f"""
version = 2
root = "{place}/containerd"
state = "{STATE}"
disabled_plugins = [{absent}]
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{place}/cni"
"""


def network(place: Path) -> dict[str, object]:
    """The pods' network. `portmap` is what opens a hostPort."""
    ranges = [[{"subnet": PODS}]]
    addresses = {"type": "host-local", "dataDir": f"{place}/addresses", "ranges": ranges}
    bridge = {
        "type": "bridge",
        "bridge": POD_BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {**addresses, "routes": [{"dst": "0.0.0.0/0"}]},
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}


def kubelet_config(place: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": ADDRESS,
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxOpenFiles": 20_000,
        # imagefs is this machine's own disk, however full it is
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "10%", "imagefs.available": "1%"},
        "evictionPressureTransitionPeriod": "20s",
        "nodeStatusUpdateFrequency": "5s",
        "volumePluginDir": f"{place}/plugins",
    }


def proxy_config(kubeconfig: Path) -> dict[str, object]:
    """Only its own namespace's rules: what it would set for the whole machine stays as it is."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": NODE,
        "clusterCIDR": PODS,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "iptables": {"masqueradeAll": True},
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


def _unmount_below(directory: Path) -> None:
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((m for m in mounted if m.startswith(f"{directory}/")), reverse=True):
        run("umount", "--lazy", point)
