"""The source of hf:// refs: huggingface_hub lists the files of a model, `Http` downloads them."""

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
from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import Limit, check_json
from cachd.model import MAX_FILES, Digest, Extent, File, Manifest, Ref, quoted
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import check_encoding
from cachd.sources.failures import bare, retry_after
from cachd.sources.http import Http, Target
from cachd.sources.response import Response
from cachd.sources.secrets import HubToken, Secret

_TOKENS = "hf_token_file, HF_TOKEN or `hf auth login`"
_LISTING = Limit(24 << 20, tokens=20 * MAX_FILES)  # a file takes some 240 bytes and 17 tokens
# What huggingface_hub raises for an answer that is not a listing.
_NO_LISTING = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)

# Telemetry sends requests to huggingface.co, whatever the configured endpoint, and waits for the answers.
constants.HF_HUB_DISABLE_TELEMETRY = True


class HubSource:
    """The models of one Hub. A revision is resolved to a commit; every file is requested at that commit.

    Digests: the LFS sha256 of a large file, the git-sha1 of a small one; the Hub states one for every file.
    The Hub redirects requests for a renamed model. `check` is called with the new base, and raises Forbidden
    when that model may not be pulled.
    """

    def __init__(
        self, http: Http, *, endpoint: str, token: Secret, check: Callable[[str], None] = lambda _base: None
    ) -> None:
        self._http, self._endpoint, self._token = http, endpoint.rstrip("/"), token
        self._check = check
        set_client_factory(lambda: httpx2.Client(transport=_HttpTransport(), trust_env=False))

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. One request gives the commit and its files."""
        api = HfApi(
            endpoint=self._endpoint,
            token=self._token.read() or False,
            library_name="cachd",
            library_version=__version__,
        )
        with _hub_errors(ref), _asks_over(self._http, cancel_token):
            found = api.model_info(ref.location, revision=ref.revision, files_metadata=True)
            if found.id != ref.location:  # the model was renamed, and the Hub redirected the request
                self._check(f"hf://{found.id}")
            if not found.sha:
                raise Unavailable(f"the Hub's listing of {ref} has no commit", code="origin_protocol")
            if ref.is_pinned and found.sha != ref.revision:
                raise Unavailable(
                    f"the Hub answered the request for {ref} with commit {found.sha!r:.80}",
                    code="origin_protocol",
                    hint="hf_endpoint is not a faithful mirror, or a branch has the form of a commit",
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
            if error.hub_error == "GatedRepo":
                raise _gated(f"hf://{repo}") from error
            raise

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()


def make(access: Access) -> HubSource:
    """The Hub of some settings."""
    columns, file = access.columns, access.columns.get("credentials")
    token = HubToken(file) if access.may_use_own_credentials else Secret(file)
    return HubSource(access.http(), endpoint=columns["endpoint"], token=token, check=access.table.check)


def _file(sibling: RepoSibling, ref: Ref, commit: str) -> File:
    size, blob_id = sibling.size, sibling.blob_id
    if size is None or (sibling.lfs is None and blob_id is None):
        raise Unavailable(
            f"the Hub lists {sibling.rfilename!r:.120} of {ref} without its size or digest",
            code="origin_protocol",
        )
    digest = Digest("sha256", sibling.lfs.sha256) if sibling.lfs else Digest("git-sha1", str(blob_id))
    return File(sibling.rfilename, size, f"{ref.base}@{commit}/{sibling.rfilename}", digest, base=ref.base)


class _HttpTransport(httpx2.BaseTransport):
    """Sends the requests of huggingface_hub through `Http`.

    So they use cachd's proxies, certificate authorities and address policy, and no .netrc. An answer that is
    too long, or too large for a parser, is refused.
    """

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        context = _context.get()
        if context is None or constants.is_offline_mode():
            raise OfflineModeIsEnabled("no pull made this request")
        (http, cancel_token), token = context, request.headers.get("Authorization")
        url, secrets = str(request.url), {"Authorization": token} if token else {}
        with http.get(url, cancel_token, secrets=secrets) as response:
            if response.status >= 400:
                return httpx2.Response(response.status, headers=response.headers.items())
            check_encoding(response, url)
            content = response.content(cancel_token, at_most=_LISTING.size_bytes)
        if content:
            check_json(content, bare(url), _LISTING)
        return httpx2.Response(response.status, headers=response.headers.items(), content=content)


_context: ContextVar[tuple[Http, CancelToken] | None] = ContextVar("context", default=None)


@contextmanager
def _asks_over(http: Http, cancel_token: CancelToken) -> Iterator[None]:
    """A context in which huggingface_hub, called by this thread, sends its requests over `http`.

    A cancel ends them.
    """
    before = _context.set((http, cancel_token))
    try:
        yield
    finally:
        _context.reset(before)


@contextmanager
def _hub_errors(ref: Ref) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into cachd's, without their texts, which may hold signed URLs."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _by_class(ref, error) from error
    except OfflineModeIsEnabled as error:
        raise Invalid(
            "HF_HUB_OFFLINE is set for the daemon, so it cannot ask the Hub",
            code="offline",
            hint="unset it for the daemon and leave it set for the pods",
        ) from error
    except _NO_LISTING as error:
        raise Unavailable(
            f"the Hub's answer for {ref.base} is not a listing: {type(error).__name__}",
            code="origin_protocol",
            hint="check whether a login page or another server is at hf_endpoint",
        ) from error


def _by_class(ref: Ref, error: HfHubHTTPError) -> CachdError:
    """The error for a failure that the Hub answered with. A gated repository counts as one not found."""
    if isinstance(error, GatedRepoError):
        return _gated(ref.base)
    if isinstance(error, RevisionNotFoundError):
        return NotFound(
            f"{ref.base} has no revision {ref.revision!r}",
            code="revision_not_found",
            hint="check the branch; a '/' in its name is written %2F",
        )
    if isinstance(error, RepositoryNotFoundError) and error.response.status_code == 401:
        return Forbidden(
            f"{ref.base} does not exist, or is private and the token was not accepted",
            code="source_unauthorized",
            hint=f"check the name, and the token of {_TOKENS}",
            origin_status=401,
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(
            f"{ref.base} does not exist, or is private",
            code="repo_not_found",
            hint=f"check the name; a private model needs a token of {_TOKENS}",
        )
    if isinstance(error, DisabledRepoError):
        return Forbidden(f"the Hub disabled {ref.base}", code="source_forbidden")
    return _by_status(ref, error)


def _gated(base: str) -> Forbidden:
    return Forbidden(
        f"{base} is gated and this token has no access",
        code="gated",
        hint=f"accept its terms on the Hub with the account of the token of {_TOKENS}",
    )


def _by_status(ref: Ref, error: HfHubHTTPError) -> CachdError:
    """The error for a status that huggingface_hub has no class for."""
    status = error.response.status_code
    if status == 401:
        return Forbidden(
            f"the Hub refused the token for {ref.base}",
            code="source_unauthorized",
            hint=f"check the token of {_TOKENS}; a token of `hf auth login` may have expired",
            origin_status=status,
        )
    if status == 403:
        return Forbidden(
            f"the token may not read {ref.base}",
            code="source_forbidden",
            hint="check the permissions of the token",
            origin_status=status,
        )
    return Unavailable(
        f"the Hub answered {status} for {ref.base}",
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(error.response.headers),
        origin_status=status,
    )
