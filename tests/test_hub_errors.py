"""Each refusal of a Hub becomes the error that says what to do next, for the listing and for a file."""

from __future__ import annotations

import pytest

from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.model import Extent, File, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.secrets import Secret
from tests.fetching import EITHER, http
from tests.ground.origin import Origin, Status

Expected = tuple[type[CachdError], str]
FILE = File("a", 2, f"hf://org/m@{'a' * 40}/a", None)
UNAUTHORIZED, FORBIDDEN = (Forbidden, "source_unauthorized"), (Forbidden, "source_forbidden")
GATED, NO_FILE = (Forbidden, "gated"), (NotFound, "file_not_found")
NO_HUB = (NotFound, "repo_not_found")
FAILED, LIMITED = (Unavailable, "origin_failed"), (Unavailable, "rate_limited")

# The status, the Hub's X-Error-Code, and the error of a listing and of a file.
REFUSALS: list[tuple[int, str | None, Expected, Expected]] = [
    (401, None, UNAUTHORIZED, UNAUTHORIZED),
    (401, "RepoNotFound", UNAUTHORIZED, UNAUTHORIZED),
    (401, "GatedRepo", GATED, GATED),
    (403, None, FORBIDDEN, FORBIDDEN),
    (403, "GatedRepo", GATED, GATED),
    (404, "RepoNotFound", (NotFound, "repo_not_found"), NO_FILE),
    (404, "RevisionNotFound", (NotFound, "revision_not_found"), NO_FILE),
    (402, None, FORBIDDEN, FORBIDDEN),
    (404, None, NO_HUB, NO_FILE),
    (405, None, NO_HUB, NO_FILE),
    (410, None, NO_HUB, NO_FILE),
    (429, None, LIMITED, LIMITED),
    (451, None, FORBIDDEN, FORBIDDEN),
    (500, None, FAILED, FAILED),
    (503, None, FAILED, FAILED),
]


def raised_by(status: Status, *, of_file: bool) -> CachdError:
    with Origin() as hub:
        hub.fault("*", status, methods=EITHER)
        source = HubSource(http(), endpoint=hub.url, token=Secret(None))

        def ask() -> object:
            if of_file:
                return source.open(FILE, Extent(0, 2), CancelToken())
            return source.resolve(Ref.parse("hf://org/m"), CancelToken())

        with pytest.raises(CachdError) as refusal:
            ask()
    return refusal.value


@pytest.mark.parametrize(("status", "said", "of_listing", "of_file"), REFUSALS)
def test_a_refusal_of_the_hub_becomes_an_error_with_its_code(
    status: int, said: str | None, of_listing: Expected, of_file: Expected
) -> None:
    refusal = Status(status, {"X-Error-Code": said} if said else {})
    for expected, found in (
        (of_listing, raised_by(refusal, of_file=False)),
        (of_file, raised_by(refusal, of_file=True)),
    ):
        assert (type(found), found.code) == expected
        assert "org/m" in found.detail
        assert found.origin_status in (None, status)


def test_a_disabled_repository_is_forbidden() -> None:
    refusal = Status(403, {"X-Error-Message": "Access to this resource is disabled."})
    found = raised_by(refusal, of_file=False)
    assert (type(found), found.code) == FORBIDDEN
    assert "disabled" in found.detail


@pytest.mark.parametrize("of_file", [False, True])
def test_a_hub_says_how_long_to_wait(*, of_file: bool) -> None:
    for status in (Status(429, {"Retry-After": "7"}), Status(503, {"RateLimit": '"api";r=0;t=6'})):
        found = raised_by(status, of_file=of_file)
        assert isinstance(found, Unavailable)
        assert found.retry_after == 7
