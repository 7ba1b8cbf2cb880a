"""The source of hf://: accounts, callers, renamed repositories, and mirrors that answer in their own way."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from cachd.errors import CachdError, Forbidden
from cachd.model import Manifest, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.secrets import Secret
from tests.fetching import EITHER, http
from tests.ground.hub import Hub
from tests.ground.origin import Status

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 300}
REF = Ref.parse("hf://org/m")
TOKEN = CancelToken()


def source(hub: Hub, place: Path | None = None, token: str = "", **more: object) -> HubSource:
    if place is not None:
        (place / "token").write_text(token or hub.token)
    secret = Secret(place / "token" if place else None)
    return HubSource(http(), endpoint=f"{hub.url}/", token=secret, **more)  # type: ignore[arg-type]


def refused(by: HubSource, ref: Ref = REF) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        by.resolve(ref, TOKEN)
    return refusal.value


def test_a_source_says_which_hub_and_whose_token_it_has(hub: Hub, tmp_path: Path) -> None:
    assert (source(hub).endpoint, source(hub).token_from) == (hub.url, "")
    assert source(hub, tmp_path).token_from == str(tmp_path / "token")
    assert source(hub).account(TOKEN) is None
    assert not hub.requests
    assert source(hub, tmp_path).account(TOKEN)
    assert hub.requests[-1].path == "/api/whoami-v2"
    with pytest.raises(Forbidden) as refusal:
        source(hub, tmp_path, "hf_wrong").account(TOKEN)
    assert refusal.value.code == "source_unauthorized"
    hub.fault("/api/whoami-v2", Status(200, body=b"[]"))
    with pytest.raises(CachdError) as no_account:
        source(hub, tmp_path).account(TOKEN)
    assert no_account.value.code == "origin_protocol"


@pytest.mark.parametrize("is_main", [True, False])
def test_a_renamed_repository_is_checked_under_its_new_name(hub: Hub, is_main: bool) -> None:
    hub.add("org/m", FILES)
    checked: list[str] = []
    assert source(hub, check=checked.append).resolve(REF, TOKEN).renamed_to is None
    assert checked == []
    hub.rename("org/m", "new/m")
    manifest = source(hub, check=checked.append, is_main=is_main).resolve(REF, TOKEN)
    assert (manifest.base, manifest.renamed_to) == ("hf://org/m", "new/m" if is_main else None)
    assert checked == ["hf://new/m"]

    def refuse(base: str) -> None:
        raise Forbidden(f"{base} is refused", code="source_refused")

    assert refused(source(hub, check=refuse)).code == "source_refused"


@pytest.mark.parametrize("status", [400, 404, 405, 410])
def test_a_mirror_that_does_not_know_the_query_for_sizes_is_asked_without_it(hub: Hub, status: int) -> None:
    commit = hub.add("org/m", FILES)
    hub.fault("*", Status(status), methods=["GET"], when=lambda seen: "blobs" in seen.query)
    manifest: Manifest = source(hub).resolve(REF, TOKEN)
    assert manifest.revision == commit
    assert sorted(file.path for file in manifest.files) == sorted(FILES)


@pytest.mark.parametrize(("status", "said"), [(404, "RepoNotFound"), (500, ""), (403, "")])
def test_a_refusal_with_a_reason_is_not_asked_about_again(hub: Hub, status: int, said: str) -> None:
    hub.add("org/m", FILES)
    headers = {"X-Error-Code": said} if said else {}
    hub.fault("*", Status(status, headers), methods=["GET"], when=lambda seen: "blobs" in seen.query)
    assert refused(source(hub)).code
    assert len(hub.requests) == 1


@pytest.mark.parametrize("body", [b"[" * 5000, b"{", b"<html>"])
def test_an_answer_that_is_no_description_is_refused(hub: Hub, body: bytes) -> None:
    hub.add("org/m", FILES)
    hub.fault("*", Status(200, body=body), methods=["GET"])
    assert refused(source(hub)).code in ("origin_protocol", "document_refused", "document_too_deep")


def test_outside_of_a_resolve_the_client_of_the_hub_asks_nothing(hub: Hub) -> None:
    hub.add("org/m", FILES)
    source(hub).resolve(REF, TOKEN)
    before = len(hub.requests)
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint=hub.url).model_info("org/m")
    assert len(hub.requests) == before


def test_a_caller_may_resolve_what_its_own_token_may_download(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/m", FILES, gated=True)
    by = source(hub, tmp_path)
    assert len(by.for_caller(hub.token).resolve(REF, TOKEN).files) == 2
    assert any(seen.headers.get("range") == "bytes=0-0" for seen in hub.requests + hub.cdn.requests)
    for token in (None, "hf_wrong"):
        with pytest.raises(Forbidden):
            by.for_caller(token).resolve(REF, TOKEN)


def test_a_touch_asks_for_one_byte_with_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/m", FILES)
    by = source(hub, tmp_path)
    file = next(each for each in by.resolve(REF, TOKEN).files if each.path == "config.json")
    by.touch(file, TOKEN)
    seen = hub.requests[-1]
    assert (seen.method, seen.headers["range"]) == ("GET", "bytes=0-0")
    assert seen.headers["authorization"] == f"Bearer {hub.token}"
    hub.fault("*", Status(403), methods=EITHER)
    with pytest.raises(Forbidden):
        by.touch(file, TOKEN)
