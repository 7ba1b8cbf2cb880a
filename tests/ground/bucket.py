"""An S3 server by script, for lies and failures that a real one (s3.py) does not know.

It lists, heads and gets, path style, and believes whoever names one of its access keys: no signature is
checked. Faults and holds are those of any `Server`; an object's path is /bucket/key.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from tests.ground.origin import Fault, File, Memory, Reply, Seen, Server, quoted

EVERY_METHOD = ("GET", "HEAD", "POST")


class Bucket(Server):
    """One bucket. `access_keys` are the key ids that may read it, from now on."""

    def __init__(self, name: str = "models", *, tls: bool = False) -> None:
        super().__init__(tls=tls)
        self.name = name
        self.access_keys = {"AKIDSCRIPTED"}
        self._objects: dict[str, File] = {}

    def put(self, key: str, content: bytes, *, etag: str = "one", **headers: str) -> str:
        """Hold an object and give its path. `x_amz_checksum_sha256="..."` is told to who asks for it."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        self._objects[key] = File(Memory(content), quoted(etag), headers=told)
        return f"/{self.name}/{key}"

    def find(self, seen: Seen) -> File | Reply:
        if not self.access_keys & _named(seen):
            return _refused(403, "InvalidAccessKeyId", seen)
        _, name, *key = seen.path.split("/", 2)
        if name != self.name:
            return _refused(404, "NoSuchBucket", seen)
        if not key or not key[0]:
            return self._listed(parse_qs(seen.query).get("prefix", [""])[0])
        held = self._objects.get(key[0])
        if held is None:
            return _refused(404, "NoSuchKey", seen)
        wanted = "x-amz-checksum-mode" in seen.headers
        told = {n: v for n, v in held.headers.items() if wanted or "checksum" not in n}
        return File(held.content, held.etag, "Fri, 02 Jan 2026 03:04:05 GMT", told)

    def _listed(self, prefix: str) -> Reply:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><ETag>{escape(held.etag or '')}</ETag>"
            f"<Size>{held.content.size}</Size></Contents>"
            for key, held in sorted(self._objects.items())
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


@dataclass(frozen=True)
class Refused(Fault):
    """A refusal in the words of S3."""

    status: int
    code: str

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>no</Message></Error>"
        return Reply.of(self.status, {"Content-Type": "application/xml"}, body.encode())


def _refused(status: int, code: str, seen: Seen) -> Reply:
    return Refused(status, code).reply(seen, Reply.of(status, {}))


def _named(seen: Seen) -> set[str]:
    """The access key that a request is signed with, in its query or its header."""
    signed = [*parse_qs(seen.query).get("X-Amz-Credential", []), seen.headers.get("authorization", "")]
    return {found[1] for text in signed if (found := re.search(r"(?:Credential=|^)(AKID\w+)/", text))}


class Sts(Server):
    """What gives out access keys for the token of a pod: another key each time, `AKIDSTS1` first."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__()
        self._bucket = bucket
        self.tokens: list[str] = []

    def find(self, seen: Seen) -> Reply:
        self.tokens += parse_qs(seen.body.decode())["WebIdentityToken"]
        key = f"AKIDSTS{len(self.tokens)}"
        self._bucket.access_keys = {key}
        body = f"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>
<SecretAccessKey>said to nobody</SecretAccessKey><SessionToken>session</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""
        return Reply.of(200, {"Content-Type": "text/xml"}, body.encode())


class Metadata(Server):
    """The metadata service of a cloud's machine: it gives out the access key `AKIDSCRIPTED`."""

    def find(self, seen: Seen) -> Reply:
        if seen.method == "PUT":
            return Reply.of(200, {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "60"}, b"token")
        if seen.path.endswith("/security-credentials/"):
            return Reply.of(200, {"Content-Type": "text/plain"}, b"role")
        given = {"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z"}
        keys = {"AccessKeyId": "AKIDSCRIPTED", "SecretAccessKey": "said to nobody", "Token": "session"}
        body = json.dumps({**given, **keys, "Expiration": "2099-01-01T00:00:00Z"})
        return Reply.of(200, {"Content-Type": "application/json"}, body.encode())


@dataclass(frozen=True)
class Throttled(Fault):
    """What STS says when it is asked too often."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        body = "<ErrorResponse><Error><Type>Sender</Type><Code>Throttling</Code></Error></ErrorResponse>"
        return Reply.of(400, {"Content-Type": "text/xml"}, body.encode())
