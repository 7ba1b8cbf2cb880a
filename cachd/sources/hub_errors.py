"""Says which error of cachd a refusal of the Hub means, and what its user can do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.sources.checks import ABSENT, REFUSALS
from cachd.sources.failures import retry_after

ARRIVED = "cachd_arrived"  # the extension of a response of huggingface_hub's client: the URL that answered
_TOKENS = "hf_token_file, HF_TOKEN or `hf auth login`"
# What huggingface_hub raises for an answer that is not a listing.
_NO_LISTING = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Asking:
    """A request to a Hub: for which ref, at which endpoint, and whether a token was sent to it."""

    base: str
    revision: str | None
    endpoint: str
    has_token: bool

    def refused_file(self, error: Forbidden) -> Forbidden:
        """The error for a refused request for a file. `error` is what `Http` raised."""
        arrived = error.detail.partition(": ")[0]
        status = error.origin_status or 0
        if status in (401, 403) and (elsewhere := self._elsewhere(arrived, status)):
            return elsewhere
        if error.hub_error == "GatedRepo":
            return self.gated(status)
        if status == 401:
            return self.unauthorized()
        return error

    def refusal(self, error: HfHubHTTPError) -> CachdError:
        """The error for a failure that the Hub answered with. A gated repository counts as not found."""
        status = error.response.status_code
        arrived = str(error.response.extensions.get(ARRIVED, ""))
        if status in (401, 403) and (elsewhere := self._elsewhere(arrived, status)):
            return elsewhere
        if isinstance(error, GatedRepoError):
            return self.gated(status)
        if isinstance(error, RevisionNotFoundError):
            return NotFound(
                f"{self.base} has no revision {self.revision!r}",
                code="revision_not_found",
                hint="check the branch; a '/' in its name is written %2F",
            )
        if isinstance(error, RepositoryNotFoundError):
            return self._absent(status)
        if isinstance(error, DisabledRepoError):
            return Forbidden(f"the Hub disabled {self.base}", code="source_forbidden")
        return self._by_status(error, status)

    def gated(self, status: int) -> Forbidden:
        """The error for a gated repository: without a token, or with one whose account has no access."""
        if not self.has_token:
            return Forbidden(
                f"{self.base} is gated and no token is set",
                code="gated",
                hint=f"accept its terms on the Hub, and set a token of that account: {_TOKENS}",
                origin_status=status or None,
            )
        return Forbidden(
            f"{self.base} is gated and the account of this token has no access yet",
            code="gated",
            hint="accept its terms on the Hub with that account; its owner may have to approve the request."
            " A fine-grained token also needs the permission to read gated repositories",
            origin_status=status or None,
        )

    def unauthorized(self) -> Forbidden:
        """The error for a token that the Hub does not know, or for a request that needs one."""
        if not self.has_token:
            return Forbidden(
                f"{self.endpoint} asks for a token for {self.base}, and none is set",
                code="source_unauthorized",
                hint=f"set a token: {_TOKENS}",
                origin_status=401,
            )
        return Forbidden(
            f"the Hub refused the token for {self.base}",
            code="source_unauthorized",
            hint=f"check the token of {_TOKENS}; a token of `hf auth login` may have expired",
            origin_status=401,
        )

    def _absent(self, status: int) -> CachdError:
        """The error for a repository that is not there, or not there for this caller."""
        if status == 401 and self.has_token:
            return Forbidden(
                f"{self.base} does not exist, or is private and the token was not accepted",
                code="source_unauthorized",
                hint=f"check the name, and the token of {_TOKENS}",
                origin_status=status,
            )
        if status == 401:
            return Forbidden(
                f"{self.base} does not exist, or is private and no token is set",
                code="source_unauthorized",
                hint=f"check the name; a private repository needs a token of {_TOKENS}",
                origin_status=status,
            )
        return NotFound(
            f"{self.base} does not exist, or is private",
            code="repo_not_found",
            hint=f"check the name; a private repository needs a token of {_TOKENS}",
        )

    def _elsewhere(self, arrived: str, status: int) -> Forbidden | None:
        """The error if another Hub than the endpoint refused the request; None if the endpoint did.

        Storage behind a Hub refuses a signed URL without any of this: its host is no Hub.
        """
        host, own = urlsplit(arrived).netloc, urlsplit(self.endpoint).netloc
        is_hub = "/resolve/" in arrived or "/api/" in arrived
        if not host or host == own or not is_hub:
            return None
        return Forbidden(
            f"{self.endpoint} redirects requests for {self.base} to {host}, which answered {status} without"
            " a token",
            code="source_redirected",
            hint=f"set hf_endpoint to https://{host}: cachd sends the token to hf_endpoint and nowhere else",
            origin_status=status,
        )

    def _by_status(self, error: HfHubHTTPError, status: int) -> CachdError:
        """The error for a status that huggingface_hub has no class for."""
        if status == 401:
            return self.unauthorized()
        if status in REFUSALS:
            return Forbidden(
                f"the token may not read {self.base} ({status})"
                if self.has_token
                else f"{self.base}: {status} without a token",
                code="source_forbidden",
                hint="check the permissions of the token" if self.has_token else f"set a token: {_TOKENS}",
                origin_status=status,
            )
        if status in ABSENT:
            return NotFound(
                f"{self.endpoint} has no {self.base}: it answered {status}",
                code="repo_not_found",
                hint="check the name, and whether a Hub or a mirror of it answers at this endpoint",
                origin_status=status,
            )
        return Unavailable(
            f"the Hub answered {status} for {self.base}",
            code="rate_limited" if status == 429 else "origin_failed",
            retry_after=retry_after(error.response.headers),
            origin_status=status,
        )


@contextmanager
def hub_errors(asking: Asking) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into cachd's, without their texts, which may hold signed URLs."""
    try:
        yield
    except HfHubHTTPError as error:
        raise asking.refusal(error) from error
    except Forbidden as error:
        if (refused := asking.refused_file(error)) is error:
            raise
        raise refused from error
    except OfflineModeIsEnabled as error:
        raise Invalid(
            "HF_HUB_OFFLINE is set for the daemon, so it cannot ask the Hub",
            code="offline",
            hint="unset it for the daemon and leave it set for the pods",
        ) from error
    except _NO_LISTING as error:
        raise Unavailable(
            f"the Hub's answer for {asking.base} is not a listing: {type(error).__name__}",
            code="origin_protocol",
            hint="check whether a login page or another server is at hf_endpoint",
        ) from error
