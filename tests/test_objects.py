"""What S3 says about an object: its size, its version and its checksum."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from cachd.model import Digest
from cachd.sources.objects import Listed, Object

SHA256, SHA1 = hashlib.sha256(b"x"), hashlib.sha1(b"x")
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


def base(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def answer(**fields: Any) -> dict[str, Any]:
    headers = {"HTTPHeaders": {"last-modified": DATE}}
    return {"ContentLength": 5, "ETag": '"e"', "ResponseMetadata": headers, **fields}


@pytest.mark.parametrize(
    ("entry", "size", "least"),
    [
        ({"Key": "a", "ETag": '"e"', "Size": 5}, 5, 5),
        ({"Key": "a/", "Size": 0}, 0, 0),
        ({"Key": "a"}, None, 1),
        ({"Key": "a/"}, None, 0),
    ],
)
def test_an_entry_of_a_listing_may_lack_its_size(entry: dict[str, Any], size: int | None, least: int) -> None:
    listed = Listed.of(entry)
    assert (listed.key, listed.etag) == (entry["Key"], entry.get("ETag", ""))
    assert (listed.size, listed.least_size) == (size, least)


@pytest.mark.parametrize(
    ("fields", "size", "validator", "version"),
    [
        ({}, 5, '"e"', None),
        ({"ContentRange": "bytes 0-0/70"}, 70, '"e"', None),
        ({"ContentRange": "bytes 0-0/*"}, 5, '"e"', None),
        ({"ETag": "e"}, 5, '"e"', None),
        ({"ETag": 'W/"e"'}, 5, DATE, None),
        ({"ETag": ""}, 5, DATE, None),
        ({"VersionId": "v1"}, 5, '"e"', "v1"),
        ({"VersionId": "null"}, 5, '"e"', None),
        ({"VersionId": ""}, 5, '"e"', None),
        ({"VersionId": "v" * 256}, 5, '"e"', "v" * 256),
        ({"VersionId": "v" * 257}, 5, '"e"', None),
    ],
)
def test_an_answer_says_the_size_and_which_version_it_is_of(
    fields: dict[str, Any], size: int, validator: str, version: str | None
) -> None:
    found = Object.of(answer(**fields))
    assert (found.size, found.validator, found.version) == (size, validator, version)
    file = found.file("path", "bucket", "key", None)
    assert (file.path, file.size, file.origin, file.digest) == ("path", size, "s3://bucket/key", None)
    assert Object.version_of(file.validator) == version
    assert Object.validator_of(file.validator) == validator
    assert (Object.version_of(None), Object.validator_of(None)) == (None, None)


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({}, None),
        ({"ChecksumSHA256": base(SHA256.digest())}, ("sha256", SHA256.hexdigest())),
        ({"ChecksumSHA1": base(SHA1.digest())}, ("sha1", SHA1.hexdigest())),
        ({"ChecksumCRC32": base(b"1234")}, ("crc32", b"1234".hex())),
        ({"ChecksumCRC32": base(b"1234"), "ChecksumCRC32C": base(b"5678")}, ("crc32c", b"5678".hex())),
        ({"ChecksumCRC64NVME": base(b"12345678")}, ("crc64nvme", b"12345678".hex())),
        ({"ChecksumSHA256": base(SHA256.digest()), "ChecksumType": "COMPOSITE"}, None),
        (
            {"ChecksumSHA1": base(SHA1.digest()), "ChecksumType": "FULL_OBJECT", "ETag": '"e-2"'},
            ("sha1", SHA1.hexdigest()),
        ),
        ({"ChecksumSHA1": base(SHA1.digest()), "ETag": '"e-2"'}, None),
        ({"ChecksumCRC64NVME": base(b"12345678"), "ETag": '"e-2"'}, ("crc64nvme", b"12345678".hex())),
        ({"ChecksumSHA256": base(SHA256.digest()) + "-2"}, None),
        ({"ChecksumSHA256": "no base64"}, None),
        ({"ChecksumSHA256": base(b"short")}, None),
        ({"ChecksumSHA256": base(b"short"), "ChecksumCRC32": base(b"1234")}, ("crc32", b"1234".hex())),
        ({"ChecksumSHA256": base(SHA256.digest()), "ContentRange": "bytes 0-0/70"}, None),
    ],
)
def test_only_a_checksum_of_the_complete_object_is_its_digest(
    fields: dict[str, Any], digest: tuple[str, str] | None
) -> None:
    found = Object.of(answer(**fields))
    assert found.digest == (Digest(*digest) if digest else None)
    stated = Digest("sha256", SHA256.hexdigest())
    assert found.file("path", "bucket", "key", stated).digest == stated


@pytest.mark.parametrize(
    ("fields", "is_folder"),
    [
        ({"ContentLength": 0}, False),
        ({"ContentLength": 0, "ContentType": "Application/X-Directory; charset=x"}, True),
        ({"ContentLength": 5, "ContentType": "application/x-directory"}, False),
        ({"ContentLength": 0, "ContentType": "text/plain"}, False),
        ({"ContentLength": 0, "Metadata": {"hdi-isfolder": "True"}}, True),
        ({"ContentLength": 0, "Metadata": {"hdi_isfolder": "true"}}, True),
        ({"ContentLength": 0, "Metadata": {"hdi_isfolder": "false"}}, False),
        ({"ContentLength": 5, "Metadata": {"hdi_isfolder": "true"}}, False),
    ],
)
def test_an_empty_object_that_a_tool_marked_is_a_folder(fields: dict[str, Any], is_folder: bool) -> None:
    assert Object.of(answer(**fields)).is_folder is is_folder
