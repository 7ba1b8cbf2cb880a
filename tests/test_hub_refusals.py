"""What a refusal of the Hub says to its user, with and without a token."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.sources.hub_errors import ARRIVED, Asking, hub_errors

HUB = "https://hub.example"
AT_HUB = f"{HUB}/org/m/resolve/main/x: 401"


def asking(*, has_token: bool) -> Asking:
    return Asking("hf://org/m", "main", HUB, has_token=has_token)


def refused(
    detail: str, status: int | None, code: str = "source_unauthorized", *, hub_error: str | None = None
) -> Forbidden:
    return Forbidden(detail, code=code, origin_status=status, hub_error=hub_error)


@pytest.mark.parametrize(
    ("has_token", "detail", "hint"),
    [
        (False, "hf://org/m is gated and no token is set", "set a token of that account"),
        (
            True,
            "the account of this token has no access yet",
            "accept its terms on the Hub with that account",
        ),
    ],
)
def test_a_gated_model_needs_a_token_whose_account_has_access(
    has_token: bool, detail: str, hint: str
) -> None:
    for status, shown in ((403, 403), (0, None)):
        error = asking(has_token=has_token).gated(status)
        assert (error.code, error.origin_status) == ("gated", shown)
        assert detail in error.detail
        assert hint in error.hint
    file = refused(AT_HUB, 403, hub_error="GatedRepo")
    assert asking(has_token=has_token).refused_file(file).code == "gated"


@pytest.mark.parametrize(
    ("has_token", "detail", "hint"),
    [(False, "asks for a token", "set a token: "), (True, "refused the token", "check the token of ")],
)
def test_a_request_without_a_valid_token_says_which_is_missing(
    has_token: bool, detail: str, hint: str
) -> None:
    error = asking(has_token=has_token).refused_file(refused(AT_HUB, 401))
    assert (error.code, error.origin_status) == ("source_unauthorized", 401)
    assert detail in error.detail
    assert error.hint.startswith(hint)


@pytest.mark.parametrize(
    ("arrived", "status", "is_elsewhere"),
    [
        ("https://other.example/org/m/resolve/main/x", 401, True),
        ("https://other.example/api/models/org/m", 403, True),
        ("https://other.example/org/m/resolve/main/x", 404, False),
        ("https://other.example/signed", 403, False),
        (f"{HUB}/org/m/resolve/main/x", 403, False),
        ("no url /resolve/", 403, False),
    ],
)
def test_another_hub_that_refuses_is_named(arrived: str, status: int, is_elsewhere: bool) -> None:
    error = refused(f"{arrived}: {status} no", status, "source_forbidden")
    found = asking(has_token=True).refused_file(error)
    assert (found.code == "source_redirected") is is_elsewhere
    assert is_elsewhere or found is error
    if is_elsewhere:
        assert f"to other.example, which answered {status}" in found.detail
        assert "set hf_endpoint to https://other.example" in found.hint
        assert found.origin_status == status


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RecursionError("x"), AttributeError("x")])
def test_an_answer_that_is_no_listing_is_the_hubs_failure(error: Exception) -> None:
    with pytest.raises(Unavailable) as refusal, hub_errors(asking(has_token=True)):
        raise error
    assert refusal.value.code == "origin_protocol"
    assert type(error).__name__ in refusal.value.detail
    assert refusal.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        NotFound("x", code="file_not_found"),
        Invalid("x", code="bad_ref"),
        refused("https://host/x: 403", 403, "source_forbidden"),
        refused("no address", None, "address_refused"),
    ],
)
def test_another_error_of_cachd_passes_unchanged(error: CachdError) -> None:
    with pytest.raises(type(error)) as refusal, hub_errors(asking(has_token=True)):
        raise error
    assert refusal.value is error


def answer(
    kind: type[HfHubHTTPError], status: int, *, arrived: str = f"{HUB}/api/models/org/m"
) -> HfHubHTTPError:
    request = httpx2.Request("GET", f"{HUB}/api/models/org/m")
    response = httpx2.Response(
        status, headers={"Retry-After": "7"}, request=request, extensions={ARRIVED: arrived}
    )
    return kind("what the Hub says", response=response)


@pytest.mark.parametrize(
    ("kind", "status", "has_token", "code", "detail", "shown"),
    [
        (GatedRepoError, 403, True, "gated", "has no access yet", 403),
        (RevisionNotFoundError, 404, True, "revision_not_found", "has no revision 'main'", None),
        (RepositoryNotFoundError, 401, True, "source_unauthorized", "the token was not accepted", 401),
        (RepositoryNotFoundError, 401, False, "source_unauthorized", "no token is set", 401),
        (RepositoryNotFoundError, 404, True, "repo_not_found", "does not exist, or is private", None),
        (DisabledRepoError, 403, True, "source_forbidden", "the Hub disabled hf://org/m", None),
        (HfHubHTTPError, 401, True, "source_unauthorized", "the Hub refused the token", 401),
        (HfHubHTTPError, 401, False, "source_unauthorized", "asks for a token", 401),
        (HfHubHTTPError, 403, True, "source_forbidden", "the token may not read hf://org/m (403)", 403),
        (HfHubHTTPError, 403, False, "source_forbidden", "403 without a token", 403),
        (HfHubHTTPError, 404, True, "repo_not_found", f"{HUB} has no hf://org/m: it answered 404", 404),
        (HfHubHTTPError, 429, True, "rate_limited", "the Hub answered 429", 429),
        (HfHubHTTPError, 500, True, "origin_failed", "the Hub answered 500", 500),
    ],
)
def test_each_answer_of_the_hub_is_an_error_that_says_what_to_do(
    kind: type[HfHubHTTPError], status: int, has_token: bool, code: str, detail: str, shown: int | None
) -> None:
    error = answer(kind, status)
    with pytest.raises(CachdError) as refusal, hub_errors(asking(has_token=has_token)):
        raise error
    found = refusal.value
    assert (found.code, found.origin_status) == (code, shown)
    assert detail in found.detail
    assert "what the Hub says" not in f"{found} {found.hint}"
    assert getattr(found, "retry_after", 7.0) == 7.0


@pytest.mark.parametrize(
    ("arrived", "status", "is_elsewhere"),
    [
        ("https://other.example/api/models/org/m", 401, True),
        ("https://other.example/api/models/org/m", 403, True),
        ("https://other.example/api/models/org/m", 404, False),
        ("https://other.example/login", 401, False),
        ("", 401, False),
    ],
)
def test_a_listing_that_another_hub_refuses_names_that_hub(
    arrived: str, status: int, is_elsewhere: bool
) -> None:
    found = asking(has_token=True).refusal(answer(HfHubHTTPError, status, arrived=arrived))
    assert (found.code == "source_redirected") is is_elsewhere


def test_a_daemon_that_is_offline_is_told_to_leave_that_to_the_pods() -> None:
    with pytest.raises(Invalid) as refusal, hub_errors(asking(has_token=False)):
        raise OfflineModeIsEnabled("x")
    assert refusal.value.code == "offline"
