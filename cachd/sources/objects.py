"""Reads what S3 says about objects: entries of a listing, and the answers to HeadObject and GetObject."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from cachd.errors import Invalid
from cachd.model import Digest, File

# Field of HeadObject's answer -> our algorithm, the strongest first. S3 computes a CRC64NVME if the uploader
# sends no checksum (S3 User Guide, "Checking object integrity").
_CHECKSUMS = {
    "ChecksumSHA256": "sha256",
    "ChecksumCRC64NVME": "crc64nvme",
    "ChecksumCRC32C": "crc32c",
    "ChecksumSHA1": "sha1",
    "ChecksumCRC32": "crc32",
}
_NEVER_COMPOSITE = "ChecksumCRC64NVME"
_OF_PARTS = re.compile(r'-[0-9]+"?$')  # the ETag of an object that was uploaded in parts
# The types that s3fs, Cyberduck and others, gateways of Azure and Swift give an empty object for a folder.
_FOLDER_TYPES = ("application/x-directory", "application/directory", "httpd/unix-directory")
_VERSION = " version="
_MAX_VERSION = 256
_UNVERSIONED = (None, "", "null")  # the version `null` is overwritten, so its id does not pin it


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing names it. `size`: None where the listing does not state it."""

    key: str
    etag: str
    size: int | None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of a listing. Raises KeyError for one without its key."""
        return cls(entry["Key"], entry.get("ETag", ""), entry.get("Size"))

    @property
    def least_size(self) -> int:
        """Its size; if it is not stated, 0 for the name of a folder, and 1 for any other."""
        return self.size if self.size is not None else int(not self.key.endswith("/"))


@dataclass(frozen=True, slots=True)
class Object:
    """An object.

    `validator`: its strong ETag, else its Last-Modified date, as in `File`. `version`: its id in a versioned
    bucket. `digest`: the checksum of the complete object, if S3 has one. `is_folder`: a tool marked it as a
    folder, by its Content-Type or (Azure) by its metadata.
    """

    size: int
    validator: str | None
    version: str | None
    digest: Digest | None
    is_folder: bool

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """Read the answer to HeadObject, or to GetObject with a range. Raises KeyError without a size."""
        total = re.search(r"/([0-9]{1,18})$", answer.get("ContentRange", ""))
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        version = answer.get("VersionId")
        return cls(
            int(total[1]) if total else answer["ContentLength"],
            _strong(answer.get("ETag", "")) or headers.get("last-modified"),
            version if version not in _UNVERSIONED and len(version) <= _MAX_VERSION else None,
            None if total else _full_object_checksum(answer),
            _is_folder(answer),
        )

    def file(self, path: str, bucket: str, key: str, digest: Digest | None) -> File:
        """The file of a model that this object is; `digest` is the one that a SHA256SUMS states."""
        pinned = f"{self.validator or ''}{_VERSION}{self.version}" if self.version else self.validator
        return File(path, self.size, f"s3://{bucket}/{key}", digest or self.digest, pinned)

    @staticmethod
    def version_of(validator: str | None) -> str | None:
        """The version that the validator of a `File` pins."""
        return (validator or "").partition(_VERSION)[2] or None

    @staticmethod
    def validator_of(validator: str | None) -> str | None:
        """The validator of a `File` in the form of HTTP."""
        return (validator or "").partition(_VERSION)[0] or None


def _is_folder(answer: Mapping[str, Any]) -> bool:
    kind = answer.get("ContentType", "").partition(";")[0].strip().lower()
    marks = {name.replace("-", "_"): value.lower() for name, value in answer.get("Metadata", {}).items()}
    is_marked = marks.get("hdi_isfolder") == "true"
    return not answer["ContentLength"] and (is_marked or kind in _FOLDER_TYPES)


def _strong(etag: str) -> str | None:
    """An ETag in the form of HTTP, which some servers send without quotes; None for a weak one or none."""
    plain = etag.strip().strip('"')
    return f'"{plain}"' if plain and not plain.startswith("W/") else None


def _full_object_checksum(head: Mapping[str, Any]) -> Digest | None:
    """The checksum of the complete object (S3 User Guide, "Checking object integrity").

    COMPOSITE checksums and ETags are not used: the former are digests of part digests, the latter may be no
    digests at all. A checksum that ends in `-N` is of N part checksums, too. Servers that do not know types
    also send a composite one without either; only CRC64NVME is always of the complete object.
    """
    kind = head.get("ChecksumType")
    if kind == "COMPOSITE":
        return None
    may_be_composite = kind is None and bool(_OF_PARTS.search(head.get("ETag", "")))
    for name, algorithm in _CHECKSUMS.items():
        checksum = head.get(name)
        if checksum and "-" not in checksum and (name == _NEVER_COMPOSITE or not may_be_composite):
            with suppress(ValueError, Invalid):  # a malformed checksum is ignored
                return Digest(algorithm, base64.b64decode(checksum, validate=True).hex())
    return None
