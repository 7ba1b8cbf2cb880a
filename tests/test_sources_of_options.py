"""The sources as the options say: their proxies, their authorities, their servers, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.config import load
from cachd.daemon.sources import authorities_of, build_sources, build_table, proxies_of
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.model import Manifest, Ref
from cachd.sources.cancel import CancelToken
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.origin.certificates import Tls, certify
from tests.ground.proxy import Proxy

ORIGIN = urlsplit("https://origin.example/m")


def test_the_proxies_are_those_of_the_options_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://environment:1")
    assert proxies_of(load()).of(ORIGIN) is None
    for option, host in (("http://option:2", "option"), ("env", "environment")):
        proxy = proxies_of(load(proxy=option)).of(ORIGIN)
        assert proxy is not None
        assert proxy.host == host
        assert proxies_of(load(proxy=option, no_proxy=["origin.example"])).of(ORIGIN) is None


def test_each_scheme_trusts_its_own_authorities_and_all_others_those_of_the_option(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        certify(path, Tls())

    def files(**options: object) -> dict[str, str | None]:
        return {scheme: found.file for scheme, found in authorities_of(load(**options)).items()}

    assert files() == {"": None}
    assert files(ca_file=one) == {"": str(one)}
    assert files(s3_ca_file=other) == {"": None, "s3": str(other)}
    assert files(ca_file=one, s3_ca_file=other) == {"": str(one), "s3": str(other)}


@pytest.mark.parametrize(
    ("options", "url", "is_refused"),
    [
        ({}, "https://huggingface.co/org/m/resolve/main/f", True),
        ({}, "https://mirror.example/org/m/resolve/main/f", False),
        ({"hf_endpoint": "https://mirror.example"}, "https://mirror.example/org/m/resolve/main/f", True),
        ({"hf_endpoint": "https://mirror.example"}, "https://huggingface.co/org/m/resolve/main/f", True),
        ({"hf_endpoint": "https://mirror.example"}, "https://origin.example/f", False),
    ],
)
def test_what_is_refused_of_the_hub_is_refused_at_every_url_of_it(
    options: dict[str, str], url: str, *, is_refused: bool
) -> None:
    table = build_table(load(sources=[{"prefix": "hf://org/", "refuse": True}], **options))
    if is_refused:
        with pytest.raises(Forbidden):
            table.check(url)
    else:
        table.check(url)


def test_the_table_has_the_entries_and_the_digests_that_are_refused() -> None:
    table = build_table(
        load(sources=[{"prefix": "hf://a/"}, {"prefix": "hf://b/"}], refuse=["sha256:" + "0" * 64])
    )
    assert [str(entry.prefix) for entry in table.entries] == ["hf://a/", "hf://b/"]
    assert len(table.refused) == 1


def resolved(ref: str, **options: object) -> Manifest:
    sources = build_sources(load(**options))
    return sources.of(Ref.parse(ref)).resolve(Ref.parse(ref), CancelToken())


def test_sources_reach_what_the_options_allow_at_the_server_that_they_name(hub: Hub, origin: Origin) -> None:
    hub.add("org/m", {"f": noise(64)})
    url = origin.add("/m", noise(64))
    resolved("hf://org/m", hf_endpoint=hub.url)
    with pytest.raises(Forbidden):
        resolved(url)
    resolved(url, allow=["127.0.0.0/8", "http://127.0.0.1/"])


def test_sources_use_the_proxy_and_show_it_the_credentials_of_the_option(
    tmp_path: Path, proxy: Proxy
) -> None:
    (tmp_path / "wrong").write_text("no colon")
    options = {"proxy": proxy.url, "allow": ["http://origin.invalid/"], "connect_seconds": 5}
    with pytest.raises(CachdError):
        resolved("http://origin.invalid/m", **options)
    with pytest.raises(Invalid):
        resolved("http://origin.invalid/m", **options, proxy_credentials_file=tmp_path / "wrong")
