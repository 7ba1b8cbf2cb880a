"""Peers that are Python libraries, each fetching one file: `python -m bench.downloads LIBRARY URL TARGET`.

URL is http(s)://HOST:PORT/BUCKET/KEY, from nginx, which takes every signature. SSL_CERT_FILE names the
authority.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

from bench.clock import clocked

MIB = 1 << 20
REGION = "us-east-1"
SIGNED = {"region_name": REGION, "aws_access_key_id": "any", "aws_secret_access_key": "any"}


def hf_transfer(url: str, target: str) -> None:
    """As huggingface_hub used it: at most 8 parts of 10 MiB at once."""
    import hf_transfer as library

    with clocked():
        library.download(
            url=url, filename=target, max_files=8, chunk_size=10 * MIB, parallel_failures=3, max_retries=5
        )


def huggingface_hub(url: str, target: str) -> None:
    """Its own download, without Xet."""
    from huggingface_hub.file_download import http_get

    with clocked(), open(target, "wb") as file:
        http_get(url, file)


def awscrt(url: str, target: str) -> None:
    """The S3 client of the AWS Common Runtime, unsigned, at its defaults."""
    from awscrt.http import HttpHeaders, HttpRequest
    from awscrt.io import ClientTlsContext, TlsContextOptions
    from awscrt.s3 import S3Client, S3RequestTlsMode, S3RequestType

    where = urlsplit(url)
    tls: dict[str, Any] = {"tls_mode": S3RequestTlsMode.DISABLED}
    if where.scheme == "https":
        trust = TlsContextOptions()
        trust.override_default_trust_store_from_path(ca_filepath=os.environ["SSL_CERT_FILE"])
        connection = ClientTlsContext(trust).new_connection_options()
        tls = {"tls_mode": S3RequestTlsMode.ENABLED, "tls_connection_options": connection}
    ended = threading.Event()
    errors: list[Exception | None] = []

    def done(error: Exception | None, **_: object) -> None:
        errors.append(error)
        ended.set()

    with clocked():
        client = S3Client(region=REGION, **tls)
        headers = HttpHeaders([("Host", where.netloc)])
        request = client.make_request(
            type=S3RequestType.GET_OBJECT,
            request=HttpRequest("GET", where.path, headers),
            recv_filepath=target,
            on_done=done,
        )
        ended.wait()
    del request
    if errors[0]:
        raise errors[0]


def boto3(url: str, target: str) -> None:
    """download_file at its defaults, by the engine in Python."""
    import boto3 as library
    from boto3.s3.transfer import TransferConfig

    where = urlsplit(url)
    bucket, _, key = where.path.lstrip("/").partition("/")
    s3 = library.client("s3", endpoint_url=f"{where.scheme}://{where.netloc}", **SIGNED)
    with clocked():
        s3.download_file(bucket, key, target, Config=TransferConfig(preferred_transfer_client="classic"))


def snapshot_download(endpoint: str, repo: str, commit: str, target: str) -> None:
    """huggingface_hub's download of a repository, without Xet."""
    from huggingface_hub import snapshot_download as download

    with clocked():
        download(repo, revision=commit, endpoint=endpoint, cache_dir=target)


if __name__ == "__main__":
    libraries = (hf_transfer, huggingface_hub, snapshot_download, awscrt, boto3)
    {library.__name__: library for library in libraries}[sys.argv[1]](*sys.argv[2:])
