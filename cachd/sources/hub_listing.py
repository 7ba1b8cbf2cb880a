"""Lists the files of a commit of the Hub, even if a mirror says less about them than the Hub.

siblings   the answer about the repository, with blobs=true: all that the Hub needs
tree       /api/models/REPO/tree/COMMIT?recursive=true, page by page: for kernels, for mirrors that leave
           out sizes or LFS digests, and for large repositories, of which `siblings` may not have all files.
           Directories of which it lists no file are asked for one by one: some mirrors list no deeper
HEAD       X-Linked-Size and X-Linked-ETag of each file: for mirrors that have no tree; or GET, if HEAD fails
commits    /api/models/REPO/commits/main, page by page: which commits begin like a shortened one
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

from cachd.errors import Invalid, NotFound, Unavailable
from cachd.foreign import Limit, check_json
from cachd.model import MAX_FILES, Digest, Entries, File, Ref, kind_and_repo, quoted
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import check_encoding, check_status
from cachd.sources.connection import origin_of
from cachd.sources.failures import bare
from cachd.sources.http import Http
from cachd.sources.http1 import number
from cachd.sources.response import Response
from cachd.sources.secrets import Secrets

LISTING = Limit(24 << 20, tokens=20 * MAX_FILES)  # a file takes some 240 bytes and 17 tokens
_MAX_PAGES = 1000
_MAX_PAGES_OF_COMMITS = 20
_MAX_SIBLINGS = 1000  # beyond these, the Hub may leave files out of the answer about a repository
_OF_GIT = {".gitattributes", ".gitignore"}  # what an empty repository has
_ASKED_AT_ONCE = 8
_MAX_REDIRECTS = 5
_NO_HEAD = (405, 501)
# The Hub keeps larger files in LFS, and files with these suffixes by the default of its .gitattributes.
_MAX_GIT_BYTES = 10 << 20
_LFS = re.compile(r"\.(safetensors|bin|gguf|pt|pth|ckpt|onnx|h5|msgpack|parquet|arrow)$", re.I)
_NEXT = re.compile(r"<([^>]*)>\s*;[^,]*\brel=\"?next\b")
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class Sibling(Protocol):
    """A file in the answer about a repository, as huggingface_hub parses it."""

    rfilename: str
    size: int | None
    blob_id: str | None
    lfs: Any


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known of a file.

    `git`: the id of its blob in git. For a file in LFS, this is the id of the pointer file and not of the
    content. `is_certain`: the file is not in LFS, so `git` is the id of its content.
    """

    size: int | None = None
    git: str | None = None
    sha256: str | None = None
    is_certain: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the size and the right digest are there."""
        return self.size is not None and (
            self.sha256 is not None or (self.git is not None and self.is_certain)
        )


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of one commit. `secrets` are for the origin of `endpoint` alone."""

    http: Http
    endpoint: str
    secrets: Secrets
    ref: Ref
    commit: str
    cancel_token: CancelToken

    def files(self, siblings: Sequence[Sibling]) -> tuple[File, ...]:
        """The files. Raises Unavailable when the Hub or mirror says too little, and as `Http` does."""
        named = [each for each in siblings if not each.rfilename.endswith("/")]  # a folder
        known = {each.rfilename: _of_sibling(each) for each in named}
        is_complete = 0 < len(known) <= _MAX_SIBLINGS
        if not is_complete or not all(entry.is_known for entry in known.values()):
            listed = self._tree()
            others = listed if not is_complete else {path: listed.get(path, known[path]) for path in known}
            known = {**known, **others}
        if known.keys() <= _OF_GIT:
            raise Invalid(
                f"{self.ref} holds no file but {', '.join(sorted(known)) or 'none'}",
                code="no_files",
                hint="nothing was uploaded to it yet, or to another branch: check the name and the revision",
            )
        lacking = [path for path, entry in known.items() if not entry.is_known]
        if lacking:
            with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
                asked = pool.map(self._ask, lacking, [known[path] for path in lacking])
                known.update(zip(lacking, asked, strict=True))
        return tuple(self._file(path, entry) for path, entry in known.items())

    def _file(self, path: str, entry: _Entry) -> File:
        if entry.size is None:
            raise Unavailable(
                f"the Hub lists {path!r:.120} of {self.ref} without its size or digest",
                code="origin_protocol",
            )
        digest = None
        if entry.sha256:
            digest = Digest("sha256", entry.sha256)
        elif entry.git and entry.is_certain:
            digest = Digest("git-sha1", entry.git)
        return File(path, entry.size, f"{self.ref.base}@{self.commit}/{path}", digest, base=self.ref.base)

    def _tree(self) -> dict[str, _Entry]:
        """The files of the tree; none if the server has no tree."""
        kind, repo = kind_and_repo(self.ref.location)
        tree = f"{self.endpoint}/api/{kind}s/{repo}/tree/{self.commit}"
        found: dict[str, _Entry] = {}
        directories, asked, count = set[str](), {""}, Entries(self.ref.base)
        following = [""]
        while following:
            for each in chain.from_iterable(self._pages(tree, directory) for directory in following):
                path = each["path"]
                if path in found or path in directories:
                    continue
                count.add(path)
                if each.get("type", "file") == "file":
                    found[path] = _of_tree(each)
                else:
                    directories.add(path)
            known = {str(above) for path in found for above in PurePosixPath(path).parents}
            following = sorted(directories - known - asked)
            asked.update(following)
            if len(asked) > _MAX_PAGES:
                raise self._too_many()
        return found

    def _pages(self, tree: str, directory: str) -> Iterator[Mapping[str, Any]]:
        """The entries of all pages of a directory of a tree; none if the server has no tree."""
        at = f"{tree}/{quoted(directory)}" if directory else tree
        url: str | None = f"{at}?recursive=true"
        seen: set[str] = set()
        while url is not None:
            if url in seen:
                raise _unfaithful(f"{bare(url)} goes on with a page that was there before")
            if len(seen) == _MAX_PAGES:
                raise self._too_many()
            seen.add(url)
            try:
                page, url = self._page(url)
            except NotFound as error:
                if directory or len(seen) > 1:
                    raise _unfaithful(f"{bare(at)} is listed, and a page of it is not there") from error
                return
            yield from page

    def _too_many(self) -> Invalid:
        return Invalid(f"{self.ref.base} has a tree of more than {_MAX_PAGES} pages", code="too_many_files")

    def commits(self, beginning: str) -> list[str]:
        """The newest commits of main that begin so. Raises as `Http` does.

        A mirror may have no such list.
        """
        kind, repo = kind_and_repo(self.ref.location)
        url: str | None = f"{self.endpoint}/api/{kind}s/{repo}/commits/main"
        found: list[str] = []
        for _ in range(_MAX_PAGES_OF_COMMITS):
            if url is None:
                break
            page, url = self._page(url)
            commits = (str(each.get("id")) for each in page)
            found += [each for each in commits if _GIT.fullmatch(each) and each.startswith(beginning)]
        return found

    def _page(self, url: str) -> tuple[Iterable[Mapping[str, Any]], str | None]:
        """The entries of one page, and the URL of the next."""
        with self.http.get(url, self.cancel_token, secrets=self.secrets) as response:
            check_status(response, url)
            check_encoding(response, url)
            content = response.content(self.cancel_token, at_most=LISTING.size_bytes)
            following = _NEXT.search(response.headers.get("Link") or "")
        check_json(content, bare(url), LISTING)
        entries = json.loads(content)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise Unavailable(f"{bare(url)} is not a tree", code="origin_protocol")
        if not following:
            return entries, None
        after = urljoin(url, following[1])
        if origin_of(urlsplit(after)) != origin_of(urlsplit(self.endpoint)):
            raise _unfaithful(f"{bare(url)} continues at another origin, {urlsplit(after).netloc:.80}")
        return entries, after

    def _ask(self, path: str, entry: _Entry) -> _Entry:
        """What the headers of a file say of it. A mirror may state no digest at all."""
        first = f"{self.endpoint}/{self.ref.location}/resolve/{self.commit}/{quoted(path)}"
        url, response = self._peek(first, "HEAD")
        said = response.headers
        if not said.get("Location") and (response.status in _NO_HEAD or response.file_size is None):
            url, response = self._peek(first, "GET")
            said = response.headers
        size = response.file_size
        if not said.get("Location"):
            check_status(response, url)
        elif not said.get("X-Linked-Size"):
            size = self._size(first)
        # Only the Hub's ETag is a digest. That of another server may be one, too, of another kind.
        stated = said.get("X-Linked-ETag") or (said.get("X-Repo-Commit") and said.get("ETag")) or ""
        tag = stated.removeprefix("W/").strip('"')
        size = number(said.get("X-Linked-Size")) if said.get("X-Linked-Size") else size
        return _Entry(
            entry.size if size is None else size,
            tag if _GIT.fullmatch(tag) else None,
            tag if _SHA256.fullmatch(tag) else None,
            is_certain=True,
        )

    def _peek(self, url: str, method: str) -> tuple[str, Response]:
        """The answer that says what a file is, after redirects within its origin, and its URL."""
        for _ in range(_MAX_REDIRECTS):
            with self.http.peek(url, self.cancel_token, secrets=self.secrets, method=method) as response:
                said = response.headers
            after = urljoin(url, said.get("Location") or "")
            is_other = origin_of(urlsplit(after)) != origin_of(urlsplit(url))
            if not said.get("Location") or said.get("X-Linked-ETag") or is_other:
                break
            url = after
        return url, response

    def _size(self, url: str) -> int | None:
        """The size of a file that is stored behind a redirect."""
        size = self.http.head(url, self.cancel_token, secrets=self.secrets).file_size
        if size is not None:
            return size
        with self.http.first_byte(url, self.cancel_token, secrets=self.secrets) as response:
            check_status(response, url)
            return response.file_size


def _unfaithful(detail: str) -> Unavailable:
    return Unavailable(detail, code="origin_protocol", hint="hf_endpoint is not a faithful mirror")


def _of_sibling(sibling: Sibling) -> _Entry:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    return _entry(sibling.rfilename, sibling.size, sibling.blob_id, sha256)


def _of_tree(entry: Mapping[str, Any]) -> _Entry:
    lfs = entry.get("lfs") or {}
    return _entry(entry["path"], entry.get("size"), entry.get("oid"), lfs.get("oid") or lfs.get("sha256"))


def _entry(path: str, size: int | None, git: str | None, in_lfs: str | None) -> _Entry:
    """What a listing says of a file. By its size and suffix, it may be in LFS or is certainly not.

    Mirrors also write the sha256 in capitals, or as `sha256:HEX`.
    """
    if type(size) is not int:
        size = None
    stated = str(in_lfs or "").lower().removeprefix("sha256:")
    sha256 = stated if _SHA256.fullmatch(stated) else None
    is_certain = size is not None and size <= _MAX_GIT_BYTES and not in_lfs and not _LFS.search(path)
    return _Entry(size, git, sha256, is_certain)
