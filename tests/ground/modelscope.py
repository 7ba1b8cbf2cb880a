"""A scripted ModelScope: the two calls that cachd makes, in the form of its public API.

    GET  /api/v1/models/{org}/{name}/repo/files?Revision=&Recursive=true   the files of a revision
    GET  /api/v1/models/{org}/{name}/repo?Revision=&FilePath=              a file; an LFS file is redirected

It is no server of ModelScope: what it does was written down from what public clients send and read.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, quote

from tests.ground.origin import File, Memory, Origin, Reply, Seen, Server

_LFS = (".safetensors", ".bin", ".gguf")


@dataclass(slots=True)
class _Repo:
    private: bool = False
    # path -> commit and content, by revision; path and commit -> content
    revisions: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    history: dict[tuple[str, str], bytes] = field(default_factory=dict)


class ModelScope(Server):
    """ModelScope; its `cdn` serves the LFS files."""

    def __init__(self) -> None:
        super().__init__()
        self.cdn = Origin()
        self.token = f"ms-{secrets.token_hex(8)}"  # the only valid one
        self.states_digests = True
        self._repos: dict[str, _Repo] = {}

    def __enter__(self) -> Self:
        self._resources.enter_context(self.cdn)
        return super().__enter__()

    def add(
        self, repo: str, files: Mapping[str, bytes], *, private: bool = False, revision: str = "master"
    ) -> None:
        """Let a branch or tag have exactly these files. A file that did not change keeps its commit."""
        kept = self._repos.setdefault(repo, _Repo())
        kept.private = private
        kept.revisions[revision] = {
            path: (hashlib.sha1(f"{repo}{path}".encode() + content).hexdigest(), content)
            for path, content in files.items()
        }
        kept.history |= {(path, each[0]): each[1] for path, each in kept.revisions[revision].items()}
        for content in files.values():
            self.cdn.add(f"/{hashlib.sha256(content).hexdigest()}", content)

    def find(self, seen: Seen) -> File | Reply:
        segments, asked = seen.target.strip("/").split("/"), parse_qs(seen.query)
        if segments[:3] != ["api", "v1", "models"] or segments[5:6] != ["repo"]:
            return Reply.of(404, {})
        repo = self._repos.get("/".join(segments[3:5]))
        if repo is None or (repo.private and seen.headers.get("cookie") != f"m_session_id={self.token}"):
            return _said(404, 10010205001, "record not found")
        revision = asked["Revision"][0]
        if segments[5:] == ["repo", "files"]:
            return self._files(repo, revision)
        return self._file(repo, revision, asked["FilePath"][0])

    def _files(self, repo: _Repo, revision: str) -> File | Reply:
        if revision not in repo.revisions:
            return _said(404, 10010205001, f"revision {revision} not found")
        files = repo.revisions[revision]
        folders = {path.rpartition("/")[0] for path in files} - {""}
        trees = [{"Name": each, "Path": each, "Type": "tree", "Size": 0, "Sha256": ""} for each in folders]
        blobs = [self._entry(path, *each) for path, each in files.items()]
        return _json(
            {"Code": 200, "Data": {"Files": [*trees, *blobs]}, "Message": "success", "Success": True}
        )

    def _entry(self, path: str, commit: str, content: bytes) -> dict[str, Any]:
        return {
            "Name": path.rpartition("/")[2],
            "Path": path,
            "Type": "blob",
            "Size": len(content),
            "Revision": commit,
            "IsLFS": path.endswith(_LFS),
            "Mode": "33188",
            "Sha256": hashlib.sha256(content).hexdigest() if self.states_digests else "",
        }

    def _file(self, repo: _Repo, revision: str, path: str) -> File | Reply:
        """The file of a branch, or of the commit that changed it last."""
        named = repo.revisions.get(revision, {}).get(path)
        content = named[1] if named else repo.history.get((path, revision))
        if content is None:
            return _said(404, 10010205001, "file not found")
        if not path.endswith(_LFS):
            return File(Memory(content), headers={"Content-Type": "application/octet-stream"})
        location = (
            f"{self.cdn.url}/{hashlib.sha256(content).hexdigest()}?auth_key={quote(secrets.token_hex(8))}"
        )
        return Reply.of(302, {"Location": location})


def _json(value: object) -> File:
    return File(Memory(json.dumps(value).encode()), headers={"Content-Type": "application/json"})


def _said(status: int, code: int, message: str) -> Reply:
    body = json.dumps({"Code": code, "Message": message, "Success": False}).encode()
    return Reply.of(status, {"Content-Type": "application/json"}, body)
