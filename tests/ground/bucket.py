"""An S3 server by script, for lies and failures that a real one (s3.py) does not know.

It lists, heads and gets, and believes whoever names one of its access keys: no signature is checked. Faults
and holds are those of any `Server`; an object's path is /bucket/key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import escape

from tests.ground.origin import Content, Fault, File, Memory, Reply, Seen, Server, quoted

EVERY_METHOD = ("GET", "HEAD", "POST")


@dataclass
class Ways:
    """How a service treats its bucket, beside the plain way; a test sets what it needs.

    `region`: the bucket's; a request that is signed for another is told it by `moved`: the 400 of a wrong
    signature, or a redirect (301, 307). `names_region`: that answer has <Region>, not a header alone.
    `forbids_path`: the error code for a bucket that is not in the host's name. `is_public`: anybody may read.
    `is_versioned`: old versions stay. `may_read_versions`: these credentials may read one by its id.
    """

    region: str | None = None
    moved: int = 400
    names_region: bool = True
    forbids_path: str | None = None
    is_public: bool = False
    is_requester_pays: bool = False
    is_versioned: bool = False
    may_read_versions: bool = True
    may_list: bool = True
    page_size: int = 1000


class Bucket(Server):
    """One bucket. `access_keys` are the key ids that may read it, from now on; `ways` how it does so."""

    def __init__(self, name: str = "models", *, tls: bool = False) -> None:
        super().__init__(tls=tls)
        self.name = name
        self.access_keys = {"AKIDSCRIPTED"}
        self.ways = Ways()
        self._objects: dict[str, File] = {}
        self._versions: dict[tuple[str, str], File] = {}

    def put(self, key: str, content: bytes | Content, *, etag: str = "one", **headers: str) -> str:
        """Hold an object and give its path. `x_amz_checksum_sha256="..."` is told to who asks for it."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.ways.is_versioned:
            told["x-amz-version-id"] = f"v{len(self._versions) + 1}"
        held = Memory(content) if isinstance(content, bytes) else content
        self._objects[key] = File(held, quoted(etag), headers=told)
        if self.ways.is_versioned:
            self._versions[key, told["x-amz-version-id"]] = self._objects[key]
        return f"/{self.name}/{key}"

    def remove(self, key: str) -> None:
        """Hold an object no longer, but for its versions."""
        del self._objects[key]

    def find(self, seen: Seen) -> File | Reply:
        bucket, key, is_virtual = self._addressed(seen)
        refusal = self._refusal(seen, bucket, is_virtual=is_virtual)
        if refusal:
            return refusal
        asked = {name: values[0] for name, values in parse_qs(seen.query, keep_blank_values=True).items()}
        if not key:
            return self._listed(asked) if self.ways.may_list else _refused(403, "AccessDenied", seen)
        version = asked.get("versionId")
        if version and not self.ways.may_read_versions:
            return _refused(403, "AccessDenied", seen)
        held = self._versions.get((key, version)) if version else self._objects.get(key)
        if held is None:
            code = "NoSuchVersion" if version else "NoSuchKey"
            return _refused(404, code, seen) if self.ways.may_list else _refused(403, "AccessDenied", seen)
        wanted = "x-amz-checksum-mode" in seen.headers
        told = {n: v for n, v in held.headers.items() if wanted or "checksum" not in n}
        return File(held.content, held.etag, "Fri, 02 Jan 2026 03:04:05 GMT", told)

    def _addressed(self, seen: Seen) -> tuple[str, str, bool]:
        """Bucket and key of a request, and whether the bucket is in the name of the host."""
        host = seen.headers.get("host", "")
        if host.startswith(f"{self.name}."):
            return self.name, seen.path.removeprefix("/"), True
        _, bucket, *key = seen.path.split("/", 2)
        return bucket, key[0] if key else "", False

    def _refusal(self, seen: Seen, bucket: str, *, is_virtual: bool) -> Reply | None:
        """What refuses the request, whatever its object is."""
        ways, keys = self.ways, _named(seen)
        if ways.forbids_path and not is_virtual:
            return _refused(403, ways.forbids_path, seen)
        if not keys and not ways.is_public:
            return _refused(403, "AccessDenied", seen)
        if keys and not self.access_keys & keys:
            return _refused(403, "InvalidAccessKeyId", seen)
        if bucket != self.name:
            return _refused(404, "NoSuchBucket", seen)
        if ways.region and _signed_for(seen) != ways.region:
            return self._moved(ways.region, seen)
        if ways.is_requester_pays and seen.headers.get("x-amz-request-payer") != "requester":
            return _refused(403, "AccessDenied", seen)
        return None

    def _moved(self, region: str, seen: Seen) -> Reply:
        code = {400: "AuthorizationHeaderMalformed", 301: "PermanentRedirect", 307: "TemporaryRedirect"}
        more = f"<Region>{region}</Region>" if self.ways.names_region and self.ways.moved == 400 else ""
        reply = Refused(self.ways.moved, code[self.ways.moved], more=more).reply(seen, Reply.of(400, {}))
        return replace(reply, headers={**reply.headers, "x-amz-bucket-region": region})

    def _listed(self, asked: Mapping[str, str]) -> Reply:
        """One page; the token of the next is the last key of this one."""
        prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
        keys = sorted(key for key in self._objects if key.startswith(prefix) and key > after)
        page = keys[: min(self.ways.page_size, int(asked.get("max-keys", 1000)))]
        encode = quote if asked.get("encoding-type") == "url" else escape
        entries = "".join(
            f"<Contents><Key>{encode(key)}</Key><ETag>{escape(self._objects[key].etag or '')}</ETag>"
            f"<Size>{self._objects[key].content.size}</Size></Contents>"
            for key in page
        )
        is_cut = len(page) < len(keys)
        then = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        form = f"<EncodingType>url</EncodingType>{then}<IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        body = f"<ListBucketResult>{form}{entries}</ListBucketResult>"
        return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


@dataclass(frozen=True)
class Refused(Fault):
    """A refusal in the words of S3."""

    status: int
    code: str
    message: str = "no"
    more: str = ""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        told = f"<Code>{self.code}</Code><Message>{self.message}</Message>{self.more}"
        body = f"<?xml version='1.0'?><Error>{told}</Error>" if seen.method != "HEAD" else ""
        return Reply.of(self.status, {"Content-Type": "application/xml"}, body.encode())


def _refused(status: int, code: str, seen: Seen) -> Reply:
    return Refused(status, code).reply(seen, Reply.of(status, {}))


def _named(seen: Seen) -> set[str]:
    """The access key that a request is signed with, in its query or its header."""
    signed = [*parse_qs(seen.query).get("X-Amz-Credential", []), seen.headers.get("authorization", "")]
    return {found[1] for text in signed if (found := re.search(r"(?:Credential=|^)(AKID\w+)/", text))}


def _signed_for(seen: Seen) -> str | None:
    """The region in a signature; that of the bucket's host for a request without one."""
    signed = [*parse_qs(seen.query).get("X-Amz-Credential", []), seen.headers.get("authorization", "")]
    found = [match[1] for text in signed if (match := re.search(r"/[0-9]{8}/([a-z0-9-]+)/s3", text))]
    return found[0] if found else None


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
