"""Refuses addresses and paths of other tools that people type as refs, and names what works instead."""

from __future__ import annotations

import re

from cachd.errors import Invalid
from cachd.model.name import shown
from cachd.model.scheme import SCHEMES

WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")

_SHARED = "mount it on the node and pull file:///path"
_GOOGLE = (
    "mount the bucket on the node and pull file:///path, or copy the model to S3; Google's own"
    " S3-compatible endpoint (s3_endpoint_url) is not tested"
)
_AZURE = "mount the container on the node and pull file:///path, or copy the model to S3"
_IMAGE = "pull the model from the Hub or S3, or copy its files to a shared volume and pull file:///path"
_GIT = "a repository of the Hub is hf://org/model; clone any other to a shared volume and pull file:///path"
_SERVER = "serve the files by https, or copy them to a shared volume and pull file:///path"
_AS_THE_NODE_SEES_IT = "write the absolute path that the node knows: file:///path"

# Scheme -> what works instead.
_ELSEWHERE = {
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss", "adl", "azure", "wasb", "wasbs"), _AZURE),
    **dict.fromkeys(("oci", "docker", "oras", "containerd"), _IMAGE),
    **dict.fromkeys(("git", "git+http", "git+https", "git+ssh", "git+file", "ssh"), _GIT),
    **dict.fromkeys(("ftp", "ftps", "sftp", "scp", "rsync"), _SERVER),
    **dict.fromkeys(("pvc", "nfs", "smb", "cifs", "hdfs", "webhdfs"), _SHARED),
    "ollama": "pull the GGUF file from the Hub: hf://org/model/file.gguf",
    "arn": "write s3://bucket/prefix/, or s3:// before the ARN of an access point",
}
# Every spelling of a scheme -> the scheme.
_SPELLINGS = {text: each for each in SCHEMES.values() for text in (each.name, *each.spellings)}


def refuse_elsewhere(text: str) -> None:
    """Raises Invalid, with a hint that names what works instead, if `text` is an address of another tool.

    The caller has checked the characters of `text`, unless it is a Windows path.
    """
    hint = _instead(text)
    if hint:
        raise Invalid(f"ref {shown(text)} has no scheme that cachd knows", code="unknown_scheme", hint=hint)


def _instead(text: str) -> str | None:
    if WINDOWS_PATH.match(text) or re.match(r"~|\.{1,2}(?:/|$)", text):
        return _AS_THE_NODE_SEES_IT
    if text.startswith("/"):
        return f"did you mean {shown(f'file://{text}')}?"
    if re.match(r"[\w.-]+@[\w.-]+:", text):
        return _GIT
    found = re.match(r"([A-Za-z][\w+.-]*):(/*)(.*)", text, re.ASCII)
    if not found:
        return None
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    known = _SPELLINGS.get(scheme)
    if known and (known.name != scheme or len(slashes) < 2):
        return f"did you mean {shown(f'{known.name}://{known.grammar.root}{rest}')}?"
    return _ELSEWHERE.get(scheme)
