"""The source of ms:// refs: the models of ModelScope.

    GET /api/v1/models/ORG/NAME/repo/files?Revision=REV&Recursive=true   each file: size, sha256, last commit
    GET /api/v1/models/ORG/NAME/repo?Revision=COMMIT&FilePath=PATH       a file; a large one is redirected

The list names no commit of the repository, so the revision of a model is a hash of its files. A file is
requested at the commit that changed it last, so its bytes never change.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import Limit, check_json
from cachd.model import MAX_FILES, Digest, Extent, File, Manifest, Ref
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import check_encoding, check_status
from cachd.sources.failures import bare
from cachd.sources.http import Http, Target
from cachd.sources.response import Response
from cachd.sources.secrets import Secret, Secrets

_DEFAULT_REVISION = "master"
_LISTING = Limit(64 << 20, tokens=40 * MAX_FILES)  # a file takes some 500 bytes and 30 tokens
_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_ABSENT = re.compile(r"not (?:found|exist)|不存在", re.I)


class ModelScopeSource:
    """The models of one ModelScope. Every file has the sha256 that it states."""

    def __init__(self, http: Http, *, endpoint: str, token: Secret) -> None:
        self._http, self._endpoint, self._token = http, endpoint.rstrip("/"), token

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. One request lists all files."""
        if ref.location.count("/") != 1:
            raise Invalid(
                f"{ref.base} is not a model of ModelScope", code="bad_ref", hint="write ms://org/model"
            )
        revision = ref.revision or _DEFAULT_REVISION
        query = urlencode({"Revision": revision, "Recursive": "true"})
        entries = self._list(
            ref, f"{self._endpoint}/api/v1/models/{ref.location}/repo/files?{query}", cancel_token
        )
        files = tuple(_file(each, ref, revision) for each in entries if each.get("Type") != "tree")
        if not files:
            raise NotFound(f"{ref} has no files", code="revision_not_found", hint="check the revision")
        content = sorted([f.path, f.size, f.origin, str(f.digest)] for f in files)
        return Manifest(ref.base, hashlib.sha256(json.dumps(content).encode()).hexdigest(), files)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`."""
        repo, _, rest = file.origin.removeprefix("ms://").partition("@")
        revision, _, path = rest.partition("/")
        query = urlencode({"Revision": revision.replace("%2F", "/"), "FilePath": path})
        url = f"{self._endpoint}/api/v1/models/{repo}/repo?{query}"
        return self._http.open(Target(url, file.size, self._secrets()), extent, cancel_token)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def _secrets(self) -> Secrets:
        token = self._token.read()
        return Secrets({"Cookie": f"m_session_id={token}"}) if token else Secrets()

    def _list(self, ref: Ref, url: str, cancel_token: CancelToken) -> list[Mapping[str, Any]]:
        """The entries of the list of files. Raises the error that the answer means."""
        with self._http.get(url, cancel_token, secrets=self._secrets()) as response:
            if response.status == 404:
                raise _absent(ref)
            if response.status in (401, 403):
                raise self._refused(ref, response.status)
            check_status(response, url)
            check_encoding(response, url)
            content = response.content(cancel_token, at_most=_LISTING.size_bytes)
        try:
            check_json(content, bare(url), _LISTING)
            answer = json.loads(content)
            if answer.get("Code") != 200:
                raise _failed(ref, answer)
            entries: list[Mapping[str, Any]] = answer["Data"]["Files"]
            if not all(isinstance(each, dict) for each in entries):
                raise TypeError("an entry is no object")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Unavailable(
                f"{bare(url)} is not a list of files: {type(error).__name__}",
                code="origin_protocol",
                hint="check whether a login page or another server is at ms_endpoint",
            ) from error
        return entries

    def _refused(self, ref: Ref, status: int) -> Forbidden:
        has_token = self._token.read() is not None
        why = "the token was not accepted" if has_token else "no token is set"
        return Forbidden(
            f"{ref.base} is private or gated, and {why}",
            code="source_unauthorized" if status == 401 else "source_forbidden",
            hint="set a token of an account that may read it: ms_token_file",
            origin_status=status,
        )


def make(access: Access) -> ModelScopeSource:
    """The ModelScope of some settings."""
    token = Secret(access.columns.get("credentials"))
    return ModelScopeSource(access.http(), endpoint=access.columns["endpoint"], token=token)


def _file(entry: Mapping[str, Any], ref: Ref, revision: str) -> File:
    path, size, sha256 = entry.get("Path"), entry.get("Size"), str(entry.get("Sha256") or "").lower()
    if not isinstance(path, str) or type(size) is not int:
        raise Unavailable(
            f"ModelScope lists {str(path)!r:.120} of {ref} without its path or size", code="origin_protocol"
        )
    commit = str(entry.get("Revision") or "")
    at = commit if _COMMIT.fullmatch(commit) else revision.replace("/", "%2F")
    digest = Digest("sha256", sha256) if _SHA256.fullmatch(sha256) else None
    # Without a commit the file may change at its address, and its sha256 says so.
    return File(path, size, f"{ref.base}@{at}/{path}", digest, base=ref.base)


def _absent(ref: Ref) -> NotFound:
    return NotFound(
        f"{ref.base} does not exist, is private, or has no revision {ref.revision or _DEFAULT_REVISION!r}",
        code="repo_not_found",
        hint="check the name and the revision; a private model needs a token (ms_token_file)",
    )


def _failed(ref: Ref, answer: Mapping[str, Any]) -> CachdError:
    """The error for an answer with a code of its own."""
    said = str(answer.get("Message") or "")
    if _ABSENT.search(said):
        return _absent(ref)
    return Unavailable(
        f"ModelScope answered {answer.get('Code')!s:.20} for {ref}: {said!r:.200}", code="origin_failed"
    )
