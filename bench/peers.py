"""What else fetches a file, at its best settings: programs and libraries that cachd is compared with."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.measure import Run, command, scripted

DOWNLOADS = Path(__file__).parent / "downloads.py"


class Origin(Protocol):
    """Where files come from; `ca_file` is the authority behind its certificate, if it has one."""

    @property
    def url(self) -> str:
        """Without a slash at the end."""

    @property
    def ca_file(self) -> Path | None:
        """None where it speaks plain http."""


@dataclass(frozen=True, slots=True)
class File:
    """A file on an origin, at /bucket/key as on S3, and its sha256 in hex."""

    origin: Origin
    path: str
    sha256: str

    @property
    def url(self) -> str:
        """Its address."""
        return f"{self.origin.url}/{self.path}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to fetch `File` to a path. `verified` checks the digest by itself; else openssl does."""

    name: str
    fetch: Callable[[File, Path], Run]
    verified: Callable[[File, Path], Run] | None = None
    program: str = ""
    library: str = ""
    slow: bool = False

    def missing(self) -> str | None:
        """What is not installed; None if nothing is."""
        if self.program and binary(self.program) is None:
            return "not installed"
        if self.library and importlib.util.find_spec(self.library) is None:
            return "not installed"
        return None


def binary(name: str) -> str | None:
    """A program beside this Python or on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def trust(origin: Origin) -> Mapping[str, str]:
    """The environment in which every peer believes the origin's certificate."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    if origin.ca_file is None:
        return quiet
    names = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
    return {**quiet, **dict.fromkeys(names, str(origin.ca_file))}


def hashed(target: Path, sha256: str) -> Run:
    """The sha256 of the file by openssl, on one core; coreutils takes four times as long. Raises Failed."""
    return command(
        *(
            "sh",
            "-c",
            'test "$(openssl dgst -sha256 -r "$0" | cut -c1-64)" = "$1" || { echo wrong bytes; exit 1; }',
        ),
        *(target, sha256),
    )


def hashed_only(path: Path) -> Run:
    """What verifying costs at least: the sha256 of a file in the page cache, on one core, by hashlib."""
    code = (
        "import hashlib, sys\nfrom bench.clock import clocked\n"
        "with clocked(), open(sys.argv[1], 'rb') as file:\n    hashlib.file_digest(file, 'sha256')"
    )
    return scripted(code, path)


def synced(target: Path) -> Run:
    """The file's bytes on the disk, by `sync FILE`."""
    return command("sync", target)


def curl(file: File, target: Path) -> Run:
    """One connection."""
    return command("curl", "-sSf", "-o", target, file.url, env=trust(file.origin))


def aria2c(file: File, target: Path, *more: str) -> Run:
    """Sixteen connections, unverified unless `more` says so."""
    believed = [f"--ca-certificate={file.origin.ca_file}"] if file.origin.ca_file else []
    return command(
        *(
            "aria2c",
            "-x16",
            "-s16",
            "-k1M",
            "--file-allocation=none",
            "--quiet",
            "--no-conf",
            *believed,
            *more,
        ),
        *("-d", target.parent, "-o", target.name, file.url),
    )


def aria2c_checksum(file: File, target: Path) -> Run:
    """Verified by itself."""
    return aria2c(file, target, f"--checksum=sha-256={file.sha256}")


def s5cmd(file: File, target: Path) -> Run:
    """The Go client of S3, unsigned."""
    words = (binary("s5cmd"), "--no-sign-request", "--endpoint-url", file.origin.url)
    return command(*words, "cp", f"s3://{file.path}", target, env=trust(file.origin))


def library(name: str) -> Callable[[File, Path], Run]:
    """A Python library, by its function in bench/downloads.py."""

    def fetch(file: File, target: Path) -> Run:
        return scripted(DOWNLOADS, name, file.url, target, env=trust(file.origin))

    return fetch


PEERS = (
    Peer("curl", curl, program="curl"),
    Peer("aria2c -x16", aria2c, aria2c_checksum, program="aria2c"),
    Peer("s5cmd", s5cmd, program="s5cmd"),
    Peer("hf_transfer", library("hf_transfer"), library="hf_transfer"),
    Peer("awscrt", library("awscrt"), library="awscrt"),
    Peer("boto3", library("boto3"), library="boto3", slow=True),
    Peer("huggingface_hub", library("huggingface_hub"), library="huggingface_hub", slow=True),
)
