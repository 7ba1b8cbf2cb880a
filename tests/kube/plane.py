"""The control plane: etcd, API server, controller manager and scheduler.

Its programs talk over the loopback of the namespace. Pods reach the API server at the node's own address, to
which the Service `kubernetes` leads.
"""

from __future__ import annotations

import secrets
import ssl
import urllib.request
from pathlib import Path

import yaml

from tests.kube.processes import Processes, run, until
from tests.kube.programs import found
from tests.kube.worker import ADDRESS, SERVICES

API, ETCD, PEERS, MANAGER, SCHEDULER = 6443, 2379, 2380, 10257, 10259


class Plane:
    """`kubeconfig` is the administrator's. Its programs start when it is made, and belong to `processes`."""

    def __init__(self, place: Path, processes: Processes) -> None:
        self.kubeconfig = place / "kubeconfig"
        self._token = secrets.token_hex(16)
        self._place, self._processes = place, processes
        self._write_files()
        self._start_etcd()
        self.start_api()
        self._start_controllers()

    def answers(self) -> bool:
        """Whether the API server says that it is ready."""
        self._processes.check()
        asked = urllib.request.Request(
            f"https://127.0.0.1:{API}/readyz", headers={"Authorization": f"Bearer {self._token}"}
        )
        unverified = ssl._create_unverified_context()  # its certificate is its own, and the network is too
        try:
            with urllib.request.urlopen(asked, context=unverified, timeout=5) as answer:
                return bool(answer.read() == b"ok")
        except OSError:
            return False

    def _write_files(self) -> None:
        key, public = self._place / "sa.key", self._place / "sa.pub"
        run("openssl", "genrsa", "-out", key, "2048")
        run("openssl", "rsa", "-in", key, "-pubout", "-out", public)
        (self._place / "tokens.csv").write_text(f"{self._token},admin,admin,system:masters\n")
        cluster = {"server": f"https://127.0.0.1:{API}", "insecure-skip-tls-verify": True}
        described = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
            "current-context": "here",
        }
        self.kubeconfig.write_text(yaml.safe_dump(described))
        self.kubeconfig.chmod(0o600)

    def _start_etcd(self) -> None:
        clients, peers = f"http://127.0.0.1:{ETCD}", f"http://127.0.0.1:{PEERS}"
        self._processes.start(
            "etcd",
            "etcd",
            *("--name", "here", "--data-dir", str(self._place / "etcd"), "--unsafe-no-fsync=true"),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", f"here={peers}"),
        )

    def start_api(self) -> None:
        """Start the API server, and wait until it is ready.

        Its admission of ServiceAccounts is off: it gives each pod a token, and no pod here needs that one.
        """
        self._processes.start(
            "kube-apiserver",
            found("kube-apiserver") or "",
            *(f"--etcd-servers=http://127.0.0.1:{ETCD}", f"--service-cluster-ip-range={SERVICES}"),
            *("--bind-address=0.0.0.0", f"--advertise-address={ADDRESS}", f"--secure-port={API}"),
            *("--insecure-port=0", f"--cert-dir={self._place}/certificates"),
            *("--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key"),
            *("--service-account-issuer=https://kubernetes.default.svc", "--token-auth-file=tokens.csv"),
            *("--authorization-mode=RBAC", "--allow-privileged=true"),
            *("--disable-admission-plugins=ServiceAccount", "--endpoint-reconciler-type=master-count"),
            "--kubelet-preferred-address-types=InternalIP",
        )
        until(self.answers, "the API server is ready")

    def stop_api(self) -> None:
        """Kill the API server; all else goes on."""
        self._processes.kill("kube-apiserver")

    def _start_controllers(self) -> None:
        own = self.kubeconfig
        access = [f"--{kind}={own}" for kind in ("kubeconfig", "authentication-kubeconfig")]
        common = [*access, f"--authorization-kubeconfig={own}", "--leader-elect=false", "--port=0"]
        self._processes.start(
            "kube-controller-manager",
            found("kube-controller-manager") or "",
            *(*common, f"--secure-port={MANAGER}", "--bind-address=127.0.0.1"),
            *("--service-account-private-key-file=sa.key", f"--cert-dir={self._place}/manager"),
            f"--root-ca-file={self._place}/certificates/apiserver.crt",  # what pods get as kube-root-ca.crt
        )
        self._processes.start(
            "kube-scheduler",
            found("kube-scheduler") or "",
            *(*common, f"--secure-port={SCHEDULER}", "--bind-address=127.0.0.1"),
            f"--cert-dir={self._place}/scheduler",
        )
