"""What a refusal of the Hub says to its user, with and without a token."""

from __future__ import annotations

import pytest

from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.sources.hub_errors import Asking, hub_errors

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
