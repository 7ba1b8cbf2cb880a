"""The source of hf:// refs: huggingface_hub says which commit a ref names, `Http` downloads its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled

from cachd import __version__
from cachd.errors import Forbidden, Unavailable
from cachd.foreign import check_json, load_json
from cachd.model import Extent, File, Manifest, Ref, is_hub_id, kind_and_repo, quoted
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import check_encoding
from cachd.sources.failures import bare
from cachd.sources.http import Http, Target
from cachd.sources.hub_errors import ARRIVED, Asking, hub_errors
from cachd.sources.hub_listing import LISTING, HubListing
from cachd.sources.response import Response
from cachd.sources.secrets import HubToken, Secret

# Telemetry sends requests to huggingface.co, whatever the configured endpoint, and waits for the answers.
constants.HF_HUB_DISABLE_TELEMETRY = True

_ACCOUNT_BYTES = 1 << 20


class HubSource:
    """The repositories of one Hub. A revision is resolved to a commit; files are requested at that commit.

    Digests: the LFS sha256 of a large file, the git-sha1 of a small one; the Hub states one for every file.
    The Hub redirects requests for a renamed repository. `check` is called with the new base, and raises
    Forbidden when that repository may not be pulled. `is_main`: it is the Hub of the daemon's own options,
    which may say what another repository is called; that of an entry may not.
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
        set_client_factory(lambda: httpx2.Client(transport=_HttpTransport(), trust_env=False))

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. One request gives the commit and its files, unless a mirror answers less."""
        token = self._token.read()
        api = HfApi(
            endpoint=self._endpoint, token=token or False, library_name="cachd", library_version=__version__
        )
        kind, repo = kind_and_repo(ref.location)
        asking = Asking(ref.base, ref.revision, self._endpoint, has_token=bool(token))
        with hub_errors(asking), _asks_over(self._http, cancel_token):
            found = api.repo_info(repo, repo_type=kind, revision=ref.revision, files_metadata=True)
            renamed_to = None
            if found.id != repo:  # the repository was renamed, and the Hub redirected the request
                renamed_to = f"{ref.location.removesuffix(repo)}{found.id}"
                self._check(f"hf://{renamed_to}")
            if not found.sha:
                raise Unavailable(f"the Hub's listing of {ref} has no commit", code="origin_protocol")
            if ref.is_pinned and found.sha != ref.revision:
                raise Unavailable(
                    f"the Hub answered the request for {ref} with commit {found.sha!r:.80}",
                    code="origin_protocol",
                    hint="hf_endpoint is not a faithful mirror, or a branch has the form of a commit",
                )
            listing = HubListing(self._http, self._endpoint, _secrets(token), ref, found.sha, cancel_token)
            files = listing.files(getattr(found, "siblings", None) or ())
            is_shown = renamed_to and self._is_main and is_hub_id(renamed_to)
            return Manifest(ref.base, found.sha, files, renamed_to=renamed_to if is_shown else None)

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
        repo, _, rest = file.origin.removeprefix("hf://").partition("@")
        commit, _, path = rest.partition("/")
        url = f"{self._endpoint}/{repo}/resolve/{commit}/{quoted(path)}"
        token = self._token.read()
        try:
            return self._http.open(Target(url, file.size, _secrets(token)), extent, cancel_token)
        except Forbidden as error:
            asking = Asking(f"hf://{repo}", commit, self._endpoint, has_token=bool(token))
            if (refused := asking.refused_file(error)) is error:
                raise
            raise refused from error

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()


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


def _secrets(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


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
