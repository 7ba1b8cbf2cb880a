"""A real Kubernetes API server on loopback, over a real etcd: no node, no kubelet, no scheduler.

    tests ── admin's token ──> kube-apiserver ──> etcd
    cachd ── a service account's token ─^

Both programs are searched on PATH and in the directory that the variable KUBE_PROGRAMS names. Kubernetes 1.20
or later is enough.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, Self

from tests.ground.origin.certificates import certify
from tests.ground.s3 import free_ports

Object = dict[str, Any]
VARIABLE, USUAL = "KUBE_PROGRAMS", "/opt/cachd-test-kube"
PROGRAMS = ("kube-apiserver", "etcd")
START_SECONDS = 400.0
_POLL_SECONDS = 0.05
_LONGEST_LOG = 2000


def program(name: str) -> str | None:
    """Where a program of Kubernetes is; None if it is not installed."""
    places = (os.environ.get("PATH", ""), os.environ.get(VARIABLE, ""), USUAL)
    return shutil.which(name, path=os.pathsep.join(filter(None, places)))


class KubeNotStarted(RuntimeError):
    """A program ended, or did not answer in time. The message ends with its log."""


class Kube:
    """The API server in `directory`, running inside `with`. `pem` has the authority of its certificate.

    `admin_token` may do everything.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.pem = directory, directory / "server.pem"
        self.admin_token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()

    def ask(self, method: str, path: str, body: object = None, *, kind: str = "application/json") -> Any:
        """What the API answers the administrator. Raises urllib.error.HTTPError."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.admin_token}", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, context=self._context, timeout=START_SECONDS) as answer:
            return json.loads(answer.read())

    def add_node(self, name: str, *, taints: tuple[Object, ...] = ()) -> None:
        """Make a Node, as a kubelet would register itself."""
        spec = {"taints": list(taints)} if taints else {}
        self.ask(
            "POST",
            "/api/v1/nodes",
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec},
        )

    def node(self, name: str) -> Object:
        found: Object = self.ask("GET", f"/api/v1/nodes/{name}")
        return found

    def create(self, each: Object) -> None:
        """Make an object of the chart: an account, a role, or a binding of one."""
        group, namespace = each["apiVersion"], each["metadata"].get("namespace")
        plural = f"{each['kind'].lower()}s"
        within = f"/namespaces/{namespace}" if namespace else ""
        self.ask("POST", f"{'/api' if group == 'v1' else '/apis'}/{group}{within}/{plural}", each)

    def token_of(self, account: str, namespace: str) -> str:
        """A token of a service account, as the kubelet gets it for a pod."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token: str = self.ask("POST", path, asked)["status"]["token"]
        return token

    def _start(self) -> None:
        certify(self.pem)
        self._context = ssl.create_default_context(cafile=str(self.pem))
        client, peer, port = free_ports(3)
        self.url, etcd = f"https://127.0.0.1:{port}", f"http://127.0.0.1:{client}"
        (self.directory / "tokens.csv").write_text(f"{self.admin_token},admin,admin,system:masters\n")
        _write_key(self.directory / "accounts.pem")
        self._run(
            "etcd",
            *("--name=a", f"--data-dir={self.directory / 'etcd'}", "--unsafe-no-fsync"),
            *(f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}"),
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=a=http://127.0.0.1:{peer}",
        )
        self._run(
            "kube-apiserver",
            *(f"--etcd-servers={etcd}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"),
            *(f"--secure-port={port}", f"--cert-dir={self.directory / 'certificates'}"),
            *(f"--tls-cert-file={self.pem}", f"--tls-private-key-file={self.pem}"),
            f"--service-account-key-file={self.directory / 'accounts.pem'}",
            f"--service-account-signing-key-file={self.directory / 'accounts.pem'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            *(f"--token-auth-file={self.directory / 'tokens.csv'}", "--authorization-mode=RBAC"),
            *("--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none"),
            *("--disable-admission-plugins=ServiceAccount,TaintNodesByCondition", "--watch-cache=false"),
        )
        self._wait()

    def _run(self, name: str, *arguments: str) -> None:
        log = (self.directory / f"{name}.log").open("wb")
        self._logs.append(log)
        command = [program(name) or name, *arguments]
        self._processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if any(each.poll() is not None for each in self._processes) or time.monotonic() > deadline:
                logs = (self.directory / f"{name}.log" for name in PROGRAMS)
                ends = [log.read_text(errors="replace")[-_LONGEST_LOG:] for log in logs]
                raise KubeNotStarted("\n".join(ends))
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        """Whether it answers, and has made the namespaces that every cluster has."""
        try:
            self.ask("GET", "/api/v1/namespaces/default")
        except (OSError, ValueError):
            return False
        return True


def _write_key(file: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form, clear = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, clear))
