"""Which proxy is asked, for what, and what its options may be."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.config import load
from cachd.errors import Invalid
from cachd.policy.proxy import Exemption, Proxies
from cachd.policy.proxy import Proxy as Address
from cachd.sources.cancel import CancelToken
from tests.ground.proxied import Nodes, over, refusal_of

# --- which proxy, and for what ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("https://proxy.corp:3129/", "https://proxy.corp:3129"),
        ("http://proxy", "http://proxy:80"),
        ("https://proxy", "https://proxy:443"),
        ("proxy:3128", "http://proxy:3128"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("HTTP://10.0.0.1:3128", "http://10.0.0.1:3128"),
    ],
)
def test_a_proxy_is_a_scheme_a_host_and_a_port(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("socks5://proxy:1080", "http://", "http://proxy:3128/path", "http://proxy:x", "http://proxy:0"),
        *("http://proxy:3128?x=y", "http://a b:3128", "file:///proxy", "http://[::1"),
    ],
)
def test_what_is_no_proxy_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="http") as refusal:
        Address.parse(text.replace("//", "//user:canary@", 1))
    assert "canary" not in str(refusal.value)
    refused = refusal_of(lambda: load(proxy=text))
    assert (type(refused), refused.code) == (Invalid, "bad_option")


def test_a_password_in_the_option_is_refused_with_a_hint_and_not_shown() -> None:
    refused = refusal_of(lambda: load(proxy="http://user:canary@proxy:3128"))
    assert refused.code == "bad_option"
    assert "proxy_credentials_file" in str(refused)
    assert "canary" not in str(refused)


@pytest.mark.parametrize(
    ("entry", "covered", "not_covered"),
    [
        ("host.corp", ["host.corp", "HOST.corp", "a.host.corp", "host.corp."], ["ahost.corp", "corp"]),
        (".corp", ["host.corp", "a.host.corp"], ["corp", "hostcorp"]),
        ("*.corp", ["host.corp"], ["corp"]),
        ("host", ["host"], ["10.0.0.1"]),
        ("host:8080", ["host:8080", "a.host:8080"], ["host", "host:80"]),
        ("host:443", ["host"], ["host:8080"]),
        ("10.1.2.3", ["10.1.2.3", "10.1.2.3:80"], ["10.1.2.4", "a10.1.2.3"]),
        ("10.1.2.3:80", ["10.1.2.3:80"], ["10.1.2.3"]),
        ("10.0.0.0/8", ["10.1.2.3", "10.9.9.9:80"], ["11.0.0.1", "host"]),
        ("10.1.2.3/8", ["10.9.9.9"], []),
        ("fd00::/8", ["[fd00::1]"], ["[fe80::1]", "10.0.0.1"]),
        ("fd00::1", ["[fd00::1]:8443"], ["[fd00::2]"]),
        ("[fd00::1]:443", ["[fd00::1]"], ["[fd00::1]:80"]),
        ("*", ["host", "10.1.2.3", "[fd00::1]:80"], []),
        ("*:8080", ["host:8080"], ["host"]),
    ],
)
def test_no_proxy_has_the_usual_forms(entry: str, covered: list[str], not_covered: list[str]) -> None:
    proxies = Proxies.configured("http://proxy:3128", [entry], {})
    assert [host for host in covered if proxies.of(urlsplit(f"https://{host}/x"))] == []
    assert [host for host in not_covered if not proxies.of(urlsplit(f"https://{host}/x"))] == []


@pytest.mark.parametrize(
    "entry", ["http://host", "host/path", "", "a b", "10.0.0.0/33", "host:port", "[::1", "::1]", "[host]"]
)
def test_what_no_proxy_cannot_mean_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="write"):
        Exemption.parse(entry)
    assert refusal_of(lambda: load(no_proxy=(entry,))).code == "bad_option"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9:80", "[::1]:8080"])
def test_the_loopback_of_this_node_is_never_asked_of_a_proxy(host: str) -> None:
    proxies = Proxies.configured("http://proxy:3128", [], {})
    assert proxies.of(urlsplit(f"http://{host}/x")) is None


ENVIRON = {
    "HTTPS_PROXY": "http://upper:1",
    "https_proxy": "http://user:pass%20word@lower:2",
    "ALL_PROXY": "all:3",
    "NO_PROXY": "direct.corp, 10.0.0.0/8  *,,odd/entry",
}


def test_the_environment_decides_only_when_it_is_asked_to() -> None:
    of = Proxies.configured(
        "env", ["also.corp"], {**ENVIRON, "NO_PROXY": "direct.corp, 10.0.0.0/8,,odd/x"}
    ).of
    secure, plain = of(urlsplit("https://host/")), of(urlsplit("http://host/"))
    assert (str(secure), str(plain)) == ("http://lower:2", "http://all:3")
    assert secure is not None
    assert secure.credentials == "user:pass word"
    assert "pass" not in f"{secure} {secure!r}"
    for host in ("direct.corp", "a.direct.corp", "10.1.2.3", "also.corp", "127.0.0.1"):
        assert of(urlsplit(f"https://{host}/")) is None
    assert Proxies.configured("env", [], ENVIRON).of(urlsplit("https://host/")) is None  # NO_PROXY has a *
    assert Proxies.configured("env", [], {}).of(urlsplit("https://host/")) is None
    assert Proxies.configured(None, [], ENVIRON).of(urlsplit("https://host/")) is None
    assert (
        str(Proxies.configured("http://one:1", [], ENVIRON).of(urlsplit("https://host/"))) == "http://one:1"
    )


def test_a_variable_that_names_no_proxy_is_told_without_its_password() -> None:
    environ = {"ALL_PROXY": "socks5://user:canary@proxy:1080"}
    refused = refusal_of(lambda: Proxies.configured("env", [], environ))
    assert refused.code == "bad_option"
    assert "ALL_PROXY" in str(refused)
    assert "canary" not in str(refused)


# --- a proxy that is not used ---


def test_an_unknown_name_says_that_a_proxy_of_the_environment_is_not_used() -> None:
    for variable in ("HTTPS_PROXY", "all_proxy"):
        http = over(None, environ={variable: "http://user:canary@proxy:3128"})
        error = refusal_of(lambda http=http: http.head("https://no-such-host.invalid/x", CancelToken()))
        assert error.code == "dns_failed"
        assert variable.upper() in error.hint
        assert "proxy: env" in error.hint
        assert "canary" not in str(error)
    assert (
        "PROXY"
        not in refusal_of(lambda: over(None).head("https://no-such-host.invalid/x", CancelToken())).hint
    )


def test_the_hint_is_there_for_every_source(node: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HTTPS_PROXY": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    env |= {"AWS_DEFAULT_REGION": "us-east-1"}
    options: dict[str, Any] = {
        "hf_endpoint": "https://hub.invalid",
        "s3_endpoint_url": "https://s3.invalid",
        "retries": 0,
    }
    running = node(env=env, **options)
    refs = {"web": "https://web.invalid/x", "hub": "hf://org/m", "s3": "s3://models/m/"}
    for name, ref in refs.items():
        running.pull(ref, name=name)
    for name in refs:
        answer = running.ready(name)
        assert answer.document["code"] == "dns_failed", answer.document
        assert "HTTPS_PROXY" in answer.document["hint"]
