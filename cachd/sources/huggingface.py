"""hf:// : the Hugging Face Hub. Its own client lists and authenticates; the bytes are ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from cachd import __version__
from cachd.errors import Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import Limit, check_json
from cachd.model import MOST_FILES, Digest, Extent, File, Manifest, Ref, quoted
from cachd.sources.answers import bare, retry_after
from cachd.sources.connection import Response
from cachd.sources.http import Http, Target
from cachd.sources.secrets import Secret
from cachd.sources.source import CancelToken

_TOKENS = "hf_token_file, HF_TOKEN or `hf auth login`"
_LISTING = Limit(24 << 20, tokens=20 * MOST_FILES)  # some 240 bytes and 17 tokens a file
# What the Hub's client makes of an answer that is no listing.
_NO_LISTING = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)

# Telemetry would ask huggingface.co even where another endpoint is configured, and wait for it.
constants.HF_HUB_DISABLE_TELEMETRY = True


class HubSource:
    """Models of one Hub. A revision becomes its commit first; every file is then asked for at that commit.

    Digests: the LFS sha256 of large files, the git-sha1 of small ones; the Hub publishes one for each.
    `check` raises Forbidden for a model that may not be pulled: asked of the name that the Hub leads to.
    """

    def __init__(
        self, http: Http, *, endpoint: str, token: Secret, check: Callable[[str], None] = lambda _base: None
    ) -> None:
        self._http, self._endpoint, self._token = http, endpoint.rstrip("/"), token
        self._check = check
        set_client_factory(lambda: httpx2.Client(transport=_OurPath(), trust_env=False))

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. One call: it names the commit and lists its files."""
        api = HfApi(
            endpoint=self._endpoint,
            token=self._token.read() or False,
            library_name="cachd",
            library_version=__version__,
        )
        with _hub_errors(ref), _asks_over(self._http, cancel_token):
            found = api.model_info(ref.location, revision=ref.revision, files_metadata=True)
            if found.id != ref.location:  # renamed, and led there
                self._check(f"hf://{found.id}")
            if not found.sha:
                raise Unavailable(f"{ref} was listed without a commit", code="origin_protocol")
            if ref.is_pinned and found.sha != ref.revision:
                raise Unavailable(
                    f"{ref} was answered with commit {found.sha!r:.80}",
                    code="origin_protocol",
                    hint="hf_endpoint is no faithful mirror, or a branch is named like a commit",
                )
            files = tuple(_file(sibling, ref, found.sha) for sibling in found.siblings or ())
            return Manifest(ref.base, found.sha, files)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`."""
        repo, _, rest = file.origin.removeprefix("hf://").partition("@")
        commit, _, path = rest.partition("/")
        url = f"{self._endpoint}/{repo}/resolve/{commit}/{quoted(path)}"
        token = self._token.read()
        secrets = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return self._http.open(Target(url, file.size, secrets), extent, cancel_token)
        except Forbidden as error:
            if error.facts.get("hub_says") == "GatedRepo":
                raise _gated(f"hf://{repo}") from error
            raise

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()


def _file(sibling: RepoSibling, ref: Ref, commit: str) -> File:
    size, blob_id = sibling.size, sibling.blob_id
    if size is None or (sibling.lfs is None and blob_id is None):
        raise Unavailable(
            f"{ref} lists {sibling.rfilename!r:.120} without its size or digest", code="origin_protocol"
        )
    digest = Digest("sha256", sibling.lfs.sha256) if sibling.lfs else Digest("git-sha1", str(blob_id))
    return File(sibling.rfilename, size, f"{ref.base}@{commit}/{sibling.rfilename}", digest, base=ref.base)


class _OurPath(httpx2.BaseTransport):
    """Lets the Hub's client ask over the same path as the bytes come, by the same proxies.

    What that path refuses is refused here too; no .netrc has a say; an answer is refused when it
    does not end, or when its parser would make too much of it.
    """

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        path = _path.get()
        if path is None or constants.is_offline_mode():
            raise OfflineModeIsEnabled("nobody asked for this")
        (http, cancel_token), token = path, request.headers.get("Authorization")
        url, secrets = str(request.url), {"Authorization": token} if token else {}
        told = http.ask(url, cancel_token, at_most=_LISTING.size_bytes, secrets=secrets)
        if told.content:
            check_json(told.content, bare(url), _LISTING)
        return httpx2.Response(told.status, headers=told.headers.items(), content=told.content)


_path: ContextVar[tuple[Http, CancelToken] | None] = ContextVar("path", default=None)


@contextmanager
def _asks_over(http: Http, cancel_token: CancelToken) -> Iterator[None]:
    """Inside, and in this thread, the Hub's client asks over `http` until it is cut."""
    before = _path.set((http, cancel_token))
    try:
        yield
    finally:
        _path.reset(before)


@contextmanager
def _hub_errors(ref: Ref) -> Iterator[None]:
    """Turn the Hub client's exceptions into ours. Its messages may name URLs, so none is repeated."""
    try:
        yield
    except GatedRepoError as error:
        raise _gated(ref.base) from error
    except RevisionNotFoundError as error:
        raise NotFound(
            f"{ref.base} has no revision {ref.revision!r}",
            code="revision_not_found",
            hint="check the branch; a '/' in its name is written %2F",
        ) from error
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise Forbidden(
                f"{ref.base} does not exist, or is private and the token was not accepted",
                code="source_unauthorized",
                hint=f"check the name, and the token of {_TOKENS}",
                status=401,
            ) from error
        raise NotFound(
            f"{ref.base} does not exist, or is private",
            code="repo_not_found",
            hint=f"check the name; a private model needs a token of {_TOKENS}",
        ) from error
    except OfflineModeIsEnabled as error:
        raise Invalid(
            "HF_HUB_OFFLINE is set where the daemon runs, so no Hub can be asked",
            code="offline",
            hint="unset it for the daemon; it is meant for the pods",
        ) from error
    except DisabledRepoError as error:
        raise Forbidden(f"the Hub disabled {ref.base}", code="source_forbidden") from error
    except HfHubHTTPError as error:
        raise _by_status(ref, error) from error
    except _NO_LISTING as error:
        raise Unavailable(
            f"the Hub's answer for {ref.base} is no listing: {type(error).__name__}",
            code="origin_protocol",
            hint="is a login page or another server at hf_endpoint?",
        ) from error


def _gated(base: str) -> Forbidden:
    return Forbidden(
        f"{base} is gated and this token has no access",
        code="gated",
        hint=f"accept its terms on the Hub with the account of the token of {_TOKENS}",
    )


def _by_status(ref: Ref, error: HfHubHTTPError) -> Exception:
    status = error.response.status_code
    if status == 401:
        return Forbidden(
            f"the Hub refused the token for {ref.base}",
            code="source_unauthorized",
            hint=f"check the token of {_TOKENS}; one of a login may have expired",
            status=status,
        )
    if status == 403:
        return Forbidden(
            f"the token may not read {ref.base}",
            code="source_forbidden",
            hint="check its rights",
            status=status,
        )
    return Unavailable(
        f"the Hub answered {status} for {ref.base}",
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(error.response.headers),
        status=status,
    )
