"""A Hugging Face Hub and the CDN behind it, faithful enough for the real huggingface_hub client.

    GET       /api/models/{repo}[/revision/{rev}][?blobs=true]         what a repository is and holds
    GET       /api/models/{repo}/tree/{rev}[/{dir}][?recursive=true]   its entries, page by page
    POST      /api/models/{repo}/paths-info/{rev}                      some of its entries
    GET       /api/whoami-v2                                           whose token it is
    GET       /api/models/{repo}/refs                                  its branches, tags and pull requests
    GET       /api/models/{repo}/commits/{rev}                         its commits, page by page
    GET HEAD  /{repo}/resolve/{rev}/{path}   a small file: 200, ETag = git blob sha1, gzip if accepted
                                             an LFS file: 302 to a signed URL of the CDN
Revisions are one percent-encoded segment. There is no Xet: clients fetch over plain HTTP. Repositories of
another kind have it in their name, `datasets/org/name`; their paths are /api/datasets/… and /datasets/….
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlencode

from tests.ground.origin import Fault, File, Memory, Origin, Reply, Seen, Server, Status, Tls

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
LFS_BYTES = 1 << 20  # files over this size are LFS whatever their name
EVERY_METHOD = ("GET", "HEAD", "POST")
TIMESTAMP = "2026-01-02T03:04:05.000Z"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit."""

    path: str
    size_bytes: int
    oid: str  # git sha1 of the blob in the repository: the file, or its LFS pointer
    sha256: str | None = None  # of the file, when it is LFS
    pointer_bytes: int = 0
    small: bytes = b""  # the file, when it is not LFS

    @property
    def cdn_path(self) -> str:
        """Where the CDN holds it."""
        return f"/lfs/{self.sha256}"

    def in_tree(self) -> dict[str, Any]:
        """As `tree` and `paths-info` show it."""
        shown = {"type": "file", "oid": self.oid, "size": self.size_bytes, "path": self.path}
        return {**shown, "lfs": {"oid": self.sha256, **self._lfs()}} if self.sha256 else shown

    def among_siblings(self) -> dict[str, Any]:
        """As `?blobs=true` shows it."""
        shown = {"rfilename": self.path, "size": self.size_bytes, "blobId": self.oid}
        return {**shown, "lfs": {"sha256": self.sha256, **self._lfs()}} if self.sha256 else shown

    def _lfs(self) -> dict[str, int]:
        return {"size": self.size_bytes, "pointerSize": self.pointer_bytes}


@dataclass(slots=True)
class Repo:
    """One model repository."""

    name: str
    private: bool = False
    gated: bool = False
    revoked: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # `refs/pr/1` is one of them
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        """The commit a branch, tag or commit names. A commit may be shortened to 7 digits."""
        known = {**self.tags, **self.branches, **{commit: commit for commit in self.commits}}
        like = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        return known.get(revision, like[0] if len(like) == 1 else None)


@dataclass(frozen=True)
class Throttled(Fault):
    """429 as the Hub says it; a `retry_after` that is text goes out as it is."""

    retry_after: int | str
    style: Literal["retry-after", "ratelimit"]

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        if self.style == "retry-after":
            return Reply.of(429, {"Retry-After": str(self.retry_after)})
        window = "api" if seen.path.startswith("/api/") else "resolvers"
        policy = f'"fixed window";"{window}";q=3000;w=300'
        limit = f'"{window}";r=0;t={self.retry_after}'
        return Reply.of(429, {"RateLimit": limit, "RateLimit-Policy": policy})


class Cdn(Origin):
    """An origin that serves only to links it has signed, and never to a request that carries a credential."""

    def __init__(self) -> None:
        super().__init__()
        self.link_lifetime_requests: int | None = None
        self.leaked: list[Seen] = []
        self._uses: dict[str, int] = {}

    def sign(self, path: str) -> str:
        """A URL that serves `path` until it expires."""
        query = {
            "Expires": int(time.time()) + 3600,
            "Signature": secrets.token_urlsafe(32),
            "Key-Pair-Id": "K1",
        }
        link = f"{path}?{urlencode(query)}"
        self._uses[link] = 0
        return self.url + link

    def expire_links(self) -> None:
        """Let every link signed so far answer 403."""
        self._uses = {}

    def find(self, seen: Seen) -> File | Reply:
        if "authorization" in seen.headers:
            self.leaked.append(seen)
            return _xml(400, "InvalidArgument", "Only one auth mechanism allowed")
        link = f"{seen.target}?{seen.query}"
        uses = self._uses.get(link)
        if uses is None or uses == self.link_lifetime_requests:
            return _xml(403, "AccessDenied", "Access denied")
        self._uses[link] = uses + 1
        return super().find(seen)


class _RefusedError(Exception):
    """A request ends here, with `reply`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        said = {"X-Error-Message": message, "Content-Type": "application/json; charset=utf-8"}
        if code is not None:
            said["X-Error-Code"] = code
        if status == 401:
            said["WWW-Authenticate"] = 'Bearer realm="Authentication required"'
        body = json.dumps({"error": message}).encode()
        self.reply = Reply.of(status, said, body).tagged(**headers)


class Hub(Server):
    """The Hub itself; as a `Server` it takes faults and holds of its own beside those of its `cdn`."""

    def __init__(self, *, tls: bool | Tls = False) -> None:
        super().__init__(tls=tls)
        self.cdn = Cdn()
        self.token = f"hf_{secrets.token_hex(17)}"  # the only valid one
        self.page_size = 1000  # entries of a tree in one answer, unless `limit` asks for fewer
        self.lacks: set[str] = set()  # by a mirror: "blobs", "lfs", "tree", "linked", "refs", …
        self.most_siblings: int | None = None  # of a large repository, the description lists no more files
        self.always_main = False  # a mirror that answers for `main`, whatever revision is asked for
        self.redirects_to = ""  # a mirror that redirects requests for files to another Hub
        self._repos: dict[str, Repo] = {}
        self._renamed: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._resources.enter_context(self.cdn)
        return super().__enter__()

    # what a test puts there

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """Commit exactly these files, move the branch `revision` there and give the commit.

        `refs/pr/1` is a branch too. `private` and `gated` say what the whole repository is from now on.
        """
        kept = self._repos.setdefault(repo, Repo(repo))
        kept.private, kept.gated = private, gated
        entries = {path: self._entry(path, files[path]) for path in sorted(files)}
        story = [repo, len(kept.commits), [(entry.path, entry.oid) for entry in entries.values()]]
        commit = hashlib.sha1(json.dumps(story).encode()).hexdigest()
        kept.commits[commit] = entries
        kept.branches[revision] = commit
        return commit

    def misstate(self, repo: str, path: str, *, of: str) -> None:
        """List a small file under git's id of the file that another repository has there."""
        listed = self._repos[repo].commits[self._repos[repo].branches["main"]]
        other = self._repos[of].commits[self._repos[of].branches["main"]][path]
        listed[path] = replace(listed[path], oid=other.oid)

    def rename(self, old: str, new: str) -> None:
        """Give a repository another name. Requests for the old one are redirected, as on the Hub."""
        self._repos[new] = replace(self._repos.pop(old), name=new)
        self._renamed[old] = new

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Let the tag `name` stand for `commit`."""
        self._repos[repo].tags[name] = commit

    def revoke(self, repo: str) -> None:
        """Take the token's account off the list of a gated repository: 403, whatever token."""
        self._repos[repo].revoked = True

    def cdn_path(self, repo: str, path: str, revision: str = "main") -> str:
        """Where `cdn` holds an LFS file: for its faults, holds and log."""
        kept = self._repos[repo]
        return kept.commits[kept.commit_of(revision) or ""][path].cdn_path

    def expire_links(self) -> None:
        """Let every CDN URL signed so far answer 403; new ones work."""
        self.cdn.expire_links()

    @property
    def link_lifetime_requests(self) -> int | None:
        """Requests a CDN URL serves before it answers 403; None is no limit."""
        return self.cdn.link_lifetime_requests

    @link_lifetime_requests.setter
    def link_lifetime_requests(self, requests: int | None) -> None:
        self.cdn.link_lifetime_requests = requests

    @property
    def leaked(self) -> list[Seen]:
        """The CDN's requests that carried a credential."""
        return [replace(seen) for seen in self.cdn.leaked]

    def throttle(
        self,
        times: int | None = 1,
        *,
        retry_after: int | str = 1,
        style: Literal["retry-after", "ratelimit"] = "retry-after",
    ) -> None:
        """Answer 429 to the next `times` requests, with a wait of `retry_after` seconds."""
        self.fault("*", Throttled(retry_after, style), times, methods=EVERY_METHOD)

    def status(self, code: int, times: int | None = 1) -> None:
        """Answer `code` to the next `times` requests."""
        self.fault("*", Status(code), times, methods=EVERY_METHOD)

    def _entry(self, path: str, content: bytes | Path) -> Entry:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if not path.endswith(LFS_SUFFIXES) and size <= LFS_BYTES:
            small = content.read_bytes() if isinstance(content, Path) else content
            return Entry(path, size, _git_sha1(small), small=small)
        sha256 = _sha256(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        entry = Entry(path, size, _git_sha1(pointer), sha256, len(pointer))
        self.cdn.add(entry.cdn_path, content, etag=sha256[:32])  # as on S3, no ETag says what the digest is
        return entry

    # what a client asks

    def find(self, seen: Seen) -> File | Reply:
        segments = seen.target.strip("/").split("/")
        try:
            if moved := self._moved(seen):
                return moved
            if segments == ["api", "whoami-v2"]:
                return self._whoami(seen)
            if segments[0] == "api" and segments[1:2] == ["models"]:
                return self._api(seen, segments[2:])
            if segments[0] == "api" and segments[1] in _KINDS:
                return self._api(seen, segments[1:])
            if "resolve" in segments[1:4] and seen.method in {"GET", "HEAD"}:
                if self.redirects_to:
                    return Reply.of(302, {"Location": f"{self.redirects_to}{seen.target}"})
                return self._resolve(seen, segments)
        except _RefusedError as refused:
            return refused.reply
        return Reply.of(404, {"Content-Type": "text/plain"}, b"Not Found")

    def answer(self, seen: Seen, file: File) -> Reply:
        reply = super().answer(seen, file)
        return reply.gzipped() if reply.status in {200, 206} and _accepts_gzip(seen) else reply

    def _moved(self, seen: Seen) -> Reply | None:
        """The redirect to the new name of a repository."""
        for old, new in self._renamed.items():
            if f"/{old}/" in f"{seen.target}/":
                query = f"?{seen.query}" if seen.query else ""
                target = f"{seen.target}/".replace(f"/{old}/", f"/{new}/").rstrip("/")
                return Reply.of(307, {"Location": f"{self.url}{target}{query}"})
        return None

    def _whoami(self, seen: Seen) -> File:
        """The account of the token."""
        if seen.headers.get("authorization") != f"Bearer {self.token}":
            raise _RefusedError(401, "Invalid username or password.")
        return _json({"type": "user", "name": "ground", "auth": {"type": "access_token"}})

    def _api(self, seen: Seen, segments: list[str]) -> File:
        verb = next((at for at in (1, 2, 3) if segments[at : at + 1] in _VERBS), len(segments))
        repo = self._repo(seen, segments[:verb])
        if "tree" in self.lacks and segments[verb : verb + 1] == ["tree"]:
            raise _RefusedError(404, "Sorry, we can't find the page you are looking for.")
        match segments[verb:]:
            case []:
                return self._model(seen, repo, "main")
            case ["revision", revision]:
                return self._model(seen, repo, "main" if self.always_main else revision)
            case ["refs"] if "refs" not in self.lacks:
                return _json(_refs(seen, repo))
            case ["commits", _] if "commits" not in self.lacks:
                return self._page(seen, [{"id": each} for each in reversed(repo.commits)])
            case ["tree", revision, *directory]:
                return self._tree(seen, repo, revision, unquote("/".join(directory)))
            case ["paths-info", revision] if seen.method == "POST":
                entries = _entries(repo, _commit(repo, revision))
                return _json(
                    [entry for path in _paths_asked(seen) for entry in entries if entry["path"] == path]
                )
        raise _RefusedError(404, "Sorry, we can't find the page you are looking for.")

    def _model(self, seen: Seen, repo: Repo, revision: str) -> File:
        if "shortened" in self.lacks and re.fullmatch(r"[0-9a-f]{7,39}", revision):
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = _commit(repo, revision)
        entries = repo.commits[commit].values()
        blobs = parse_qs(seen.query).get("blobs") == ["true"] and "blobs" not in self.lacks
        siblings = [entry.among_siblings() if blobs else {"rfilename": entry.path} for entry in entries]
        for sibling in siblings if "lfs" in self.lacks else ():
            sibling.pop("lfs", None)
        siblings = siblings[: self.most_siblings]
        shown = {
            "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
            "id": (plain := repo.name.partition("/")[2] if repo.name.startswith(_KINDS) else repo.name),
            "modelId": plain,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": TIMESTAMP,
            "createdAt": TIMESTAMP,
            "siblings": siblings,
        }
        if repo.name.startswith("kernels/"):  # no list of files
            del shown["siblings"]
        return _json(shown)

    def _tree(self, seen: Seen, repo: Repo, revision: str, directory: str) -> File:
        commit = _commit(repo, revision)
        under = f"{directory}/" if directory else ""
        entries = [entry for entry in _entries(repo, commit) if entry["path"].startswith(under)]
        for entry in entries if "lfs" in self.lacks else ():
            entry.pop("lfs", None)
        if not entries:
            raise _no_entry(directory, commit)
        asked = parse_qs(seen.query)
        if asked.get("recursive") not in (["true"], ["True"], ["1"]):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(under)]
        return self._page(seen, entries)

    def _page(self, seen: Seen, entries: list[dict[str, Any]]) -> File:
        asked = parse_qs(seen.query)
        start = int(asked.get("cursor", ["0"])[0])
        stop = start + min(self.page_size, int(asked.get("limit", [self.page_size])[0]))
        if stop >= len(entries):
            return _json(entries[start:])
        query = urlencode({**{name: values[0] for name, values in asked.items()}, "cursor": stop})
        return _json(entries[start:stop], Link=f'<{self.url}{seen.target}?{query}>; rel="next"')

    def _resolve(self, seen: Seen, segments: list[str]) -> File | Reply:
        verb = segments.index("resolve")
        repo = self._repo(seen, segments[:verb])
        self._pass_gate(seen, repo)
        revision, *path = segments[verb + 1 :]
        commit = _commit(repo, revision)
        entry = repo.commits[commit].get(unquote("/".join(path)))
        if entry is None:
            raise _no_entry(unquote("/".join(path)), commit)
        headers = {"X-Repo-Commit": commit, "Content-Type": "text/plain; charset=utf-8"}
        if entry.sha256 is None:
            return File(Memory(entry.small), f'"{entry.oid}"', headers=headers)
        location = self.cdn.sign(entry.cdn_path)
        linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size_bytes)}
        if "linked" in self.lacks:
            linked = {}
        said = {**headers, **linked, "Location": location, "Vary": "Accept"}
        return Reply.of(302, said, f"Found. Redirecting to {location}".encode())

    # who may

    def _repo(self, seen: Seen, segments: list[str]) -> Repo:
        """The repository, if the request may know of it."""
        credential = seen.headers.get("authorization")
        if credential not in {None, f"Bearer {self.token}"}:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        repo = self._repos.get(unquote("/".join(segments)))
        if repo is None or (repo.private and credential is None):
            # without a credential the Hub does not tell a private repository from a missing one
            raise _RefusedError(404 if credential else 401, "Repository not found", "RepoNotFound")
        return repo

    def _pass_gate(self, seen: Seen, repo: Repo) -> None:
        if not repo.gated:
            return
        if "authorization" not in seen.headers:
            message = (
                f"Access to model {repo.name} is restricted. You must have access to it and be authenticated."
            )
            raise _RefusedError(401, message, "GatedRepo")
        if repo.revoked:
            message = f"Access to model {repo.name} is restricted and you are not in the authorized list."
            raise _RefusedError(403, message, "GatedRepo")


_KINDS = ("datasets", "kernels")
_VERBS = (["revision"], ["tree"], ["refs"], ["paths-info"], ["commits"])


def _commit(repo: Repo, revision: str) -> str:
    commit = repo.commit_of(unquote(revision))
    if commit is None:
        raise _RefusedError(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
    return commit


def _no_entry(path: str, commit: str) -> _RefusedError:
    return _RefusedError(404, f"Entry not found: {path}", "EntryNotFound", X_Repo_Commit=commit)


def _entries(repo: Repo, commit: str) -> list[dict[str, Any]]:
    """All files and directories of a commit, as a recursive tree shows them."""
    files = repo.commits[commit].values()
    parents = {str(parent) for entry in files for parent in Path(entry.path).parents} - {"."}
    directories = [
        {"type": "directory", "oid": _git_sha1(f"{commit}/{path}".encode()), "size": 0, "path": path}
        for path in parents
    ]
    return sorted([*directories, *(entry.in_tree() for entry in files)], key=lambda entry: entry["path"])


def _refs(seen: Seen, repo: Repo) -> dict[str, Any]:
    def shown(prefix: str, named: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": commit} for n, commit in named.items()]

    heads = {name: commit for name, commit in repo.branches.items() if not name.startswith("refs/")}
    pulls = {name: commit for name, commit in repo.branches.items() if name.startswith("refs/")}
    refs = {"branches": shown("refs/heads/", heads), "tags": shown("refs/tags/", repo.tags), "converts": []}
    return {**refs, "pullRequests": shown("", pulls)} if "include_prs" in parse_qs(seen.query) else refs


def _paths_asked(seen: Seen) -> list[str]:
    if "json" in seen.headers.get("content-type", ""):
        return list(json.loads(seen.body)["paths"])
    return parse_qs(seen.body.decode()).get("paths", [])


def _accepts_gzip(seen: Seen) -> bool:
    accepted = seen.headers.get("accept-encoding", "")
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted) is not None


def _json(value: object, **headers: str) -> File:
    said = {"Content-Type": "application/json; charset=utf-8", **headers}
    return File(Memory(json.dumps(value).encode()), headers=said)


def _xml(status: int, code: str, message: str) -> Reply:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Reply.of(status, {"Content-Type": "text/xml"}, body.encode())


def _git_sha1(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
