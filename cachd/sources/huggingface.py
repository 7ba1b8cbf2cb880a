"""The source of hf:// refs: huggingface_hub says which commit a ref names, `Http` downloads its files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from cachd import __version__
from cachd.errors import CachdError, Changed, Forbidden, NotFound, Unavailable
from cachd.foreign import check_json, load_json
from cachd.model import SHORTENED, Extent, File, Manifest, Ref, is_hub_id, kind_and_repo, quoted
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import ABSENT, check_encoding
from cachd.sources.failures import bare
from cachd.sources.http import Http, Target
from cachd.sources.hub_caller import HubCaller
from cachd.sources.hub_errors import ARRIVED, Asking, hub_errors
from cachd.sources.hub_listing import LISTING, HubListing
from cachd.sources.response import Response
from cachd.sources.secrets import GivenSecret, HubToken, Secret, Secrets

# Telemetry sends requests to huggingface.co, whatever the configured endpoint, and waits for the answers.
constants.HF_HUB_DISABLE_TELEMETRY = True
_MAX_SHOWN = 5

_ACCOUNT_BYTES = 1 << 20


@functools.cache
def ask_over_our_client() -> None:
    """Let the Hub's client ask over ours. Once: it closes the session in which other threads ask."""
    set_client_factory(lambda: httpx2.Client(transport=_HttpTransport(), trust_env=False))


class HubSource:
    """The repositories of one Hub. A revision is resolved to a commit; files are requested at that commit.

    Digests: the LFS sha256 of a large file, the git-sha1 of a small one; the Hub states one for every file.
    The Hub redirects requests for a renamed repository. `check` is called with the new base, and raises
    Forbidden when that repository may not be pulled. `is_main`: whether this is the Hub of the daemon's own
    options. Only that Hub may give a repository another name in the Hub view.
    """

    def __init__(
        self,
        http: Http,
        *,
        endpoint: str,
        token: Secret,
        check: Callable[[str], None] = lambda _base: None,
        is_main: bool = True,
    ) -> None:
        self._http, self._endpoint, self._token = http, endpoint.rstrip("/"), token
        self._check, self._is_main = check, is_main
        ask_over_our_client()

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. One request gives the commit and its files, unless a mirror answers less."""
        try:
            return self._resolve(ref, cancel_token)
        except NotFound as error:
            if error.code != "revision_not_found" or not SHORTENED.fullmatch(ref.revision or ""):
                raise
            raise self._shortened(ref, error, cancel_token) from error

    def _resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        token = self._token.read()
        api = HfApi(
            endpoint=self._endpoint, token=token or False, library_name="cachd", library_version=__version__
        )
        _, repo = kind_and_repo(ref.location)
        asking = Asking(ref.base, ref.revision, self._endpoint, has_token=bool(token))
        with hub_errors(asking), _asks_over(self._http, cancel_token):
            found = _described(api, ref)
            renamed_to = None
            if found.id != repo:  # the repository was renamed, and the Hub redirected the request
                renamed_to = f"{ref.location.removesuffix(repo)}{found.id}"
                self._check(f"hf://{renamed_to}")
            if not found.sha:
                raise Unavailable(f"the Hub's listing of {ref} has no commit", code="origin_protocol")
            _check_commit(api, ref, found.sha)
            listing = HubListing(self._http, self._endpoint, _secrets(token), ref, found.sha, cancel_token)
            files = listing.files(getattr(found, "siblings", None) or ())
            is_shown = renamed_to and self._is_main and is_hub_id(renamed_to)
            return Manifest(ref.base, found.sha, files, renamed_to=renamed_to if is_shown else None)

    def _shortened(self, ref: Ref, error: NotFound, cancel_token: CancelToken) -> NotFound:
        """The error for a shortened commit that is not there: a mirror may not know its form."""
        beginning, token = ref.revision or "", self._token.read()
        listing = HubListing(self._http, self._endpoint, _secrets(token), ref, "main", cancel_token)
        found: list[str] = []
        with suppress(CachdError, ValueError):
            found = listing.commits(beginning)
        listed = ", ".join(found[:_MAX_SHOWN])
        hint = f"commits of main that begin so: {listed}; " if found else "check the digits; "
        return NotFound(
            error.detail, code=error.code, hint=f"{hint}a mirror may take a commit only with all 40 digits"
        )

    @property
    def endpoint(self) -> str:
        """The URL of the Hub."""
        return self._endpoint

    @property
    def token_from(self) -> str:
        """The file or variable that the token is read from; empty for none."""
        return self._token.where

    def account(self, cancel_token: CancelToken) -> str | None:
        """The name of the account whose token it is, as the Hub says; None without a token.

        Raises Forbidden when the Hub refuses the token, Invalid when it cannot be read, Unavailable.
        """
        token = self._token.read()
        if token is None:
            return None
        asking = Asking(self._endpoint, None, self._endpoint, has_token=True)
        url = f"{self._endpoint}/api/whoami-v2"
        with hub_errors(asking):
            content = self._http.read(url, cancel_token, at_most=_ACCOUNT_BYTES, secrets=_secrets(token))
            return str(load_json(content, bare(url), LISTING)["name"])

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`."""
        url, repo, commit = self._place(file)
        token = self._token.read()
        try:
            return self._http.open(Target(url, file.size, _secrets(token)), extent, cancel_token)
        except Changed as error:  # a file of a commit never changes
            raise Unavailable(
                error.detail,
                code="origin_protocol",
                hint="hf_endpoint is no faithful mirror, or answers with a page: open the URL in a browser",
                origin_status=error.origin_status,
            ) from error
        except Forbidden as error:
            asking = Asking(f"hf://{repo}", commit, self._endpoint, has_token=bool(token))
            if (refused := asking.refused_file(error)) is error:
                raise
            raise refused from error

    def _place(self, file: File) -> tuple[str, str, str]:
        """The URL of a file, its repository and its commit."""
        repo, _, rest = file.origin.removeprefix("hf://").partition("@")
        commit, _, path = rest.partition("/")
        return f"{self._endpoint}/{repo}/resolve/{commit}/{quoted(path)}", repo, commit

    def touch(self, file: File, cancel_token: CancelToken) -> None:
        """Request the first byte of a file with the token, whoever was redirected before.

        Raises NotFound, Forbidden, Changed, Invalid, Unavailable or Cancelled.
        """
        self._http.touch(self._place(file)[0], cancel_token, secrets=_secrets(self._token.read()))

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def for_caller(self, token: str | None) -> HubCaller:
        """See `ForCallers.for_caller`."""
        secret, check = GivenSecret(token or ""), self._check
        own = HubSource(self._http, endpoint=self._endpoint, token=secret, check=check, is_main=self._is_main)
        return HubCaller(own)


def make(access: Access) -> HubSource:
    """The Hub of some settings."""
    columns, file = access.columns, access.columns.get("credentials")
    token = HubToken(file) if access.may_use_own_credentials else Secret(file)
    return HubSource(
        access.http(),
        endpoint=columns["endpoint"],
        token=token,
        check=access.table.check,
        is_main=not access.has_own_endpoint,
    )


def _described(api: HfApi, ref: Ref) -> Any:
    """What the Hub says about a repository. A mirror may not know the query that asks for sizes."""
    kind, repo = kind_and_repo(ref.location)
    try:
        return api.repo_info(repo, repo_type=kind, revision=ref.revision, files_metadata=True)
    except HfHubHTTPError as error:
        is_unexplained = not error.response.headers.get("X-Error-Code")
        if error.response.status_code not in (400, *ABSENT) or not is_unexplained:
            raise
    return api.repo_info(repo, repo_type=kind, revision=ref.revision)


def _check_commit(api: HfApi, ref: Ref, commit: str) -> None:
    """Raises Unavailable if a commit was asked for, and this is another one.

    What looks like a shortened commit may be a branch or a tag, which comes first, as in git.
    """
    asked = ref.revision or ""
    if not (ref.is_pinned or SHORTENED.fullmatch(asked)) or commit.startswith(asked):
        return
    kind, repo = kind_and_repo(ref.location)
    if not ref.is_pinned:
        with suppress(HfHubHTTPError):
            refs = api.list_repo_refs(repo, repo_type=kind)
            if any(each.name == asked for each in (*refs.branches, *refs.tags)):
                return
    raise Unavailable(
        f"the Hub answered the request for {ref} with commit {commit!r:.80}",
        code="origin_protocol",
        hint="hf_endpoint is not a faithful mirror, or a branch has the form of a commit",
    )


def _secrets(token: str | None) -> Secrets:
    return Secrets({"Authorization": f"Bearer {token}"}) if token else Secrets()


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
        url, secrets = str(request.url), Secrets({"Authorization": token}) if token else Secrets()
        with http.get(url, cancel_token, secrets=secrets) as response:
            if response.status >= 400:
                arrived = {ARRIVED: response.url}
                return httpx2.Response(response.status, headers=response.headers.items(), extensions=arrived)
            check_encoding(response, url)
            content = response.content(cancel_token, at_most=LISTING.size_bytes)
        if content:
            check_json(content, bare(url), LISTING)
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
