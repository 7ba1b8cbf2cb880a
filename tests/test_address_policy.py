"""The address policy checks every address of a host, and a host of which it knows no address."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError
from cachd.policy.address_policy import AddressPolicy, Anywhere
from cachd.policy.prefixes import Prefix
from cachd.policy.verdicts import Rule, Verdicts

REFUSED = Prefix.parse("https://evil/")
VERDICTS = Verdicts({REFUSED: Rule(is_allowed=False, by=REFUSED)})


def refusal(policy: AddressPolicy, url: str, *addresses: str) -> str:
    """The code that a host with these addresses is refused with; empty if it may be reached."""
    try:
        policy.check_addresses(urlsplit(url), addresses)
    except CachdError as error:
        return error.code
    return ""


@pytest.mark.parametrize(
    ("url", "addresses", "code"),
    [
        ("https://host/", ["8.8.8.8"], ""),
        ("https://host/", ["8.8.8.8", "1.1.1.1"], ""),
        ("https://host/", ["10.0.0.1"], "private_address"),
        ("https://host/", ["8.8.8.8", "10.0.0.1"], "private_address"),
        ("https://host/", ["10.0.0.1", "8.8.8.8"], "private_address"),
        ("http://host/", ["8.8.8.8"], "plaintext_refused"),
        ("https://host/", [], ""),
        ("https://host.example./", [], ""),
        ("https://1host/", [], ""),
        ("http://host/", [], "plaintext_refused"),
        ("https://2130706433/", [], "private_address"),
        ("https://127.1/", [], "private_address"),
        ("https://127.1./", [], "private_address"),
        ("https://host.0x7f/", [], "private_address"),
    ],
)
def test_a_host_is_reached_if_all_its_addresses_may_be_and_if_it_is_a_name(
    url: str, addresses: list[str], code: str
) -> None:
    assert refusal(AddressPolicy([]), url, *addresses) == code
    assert refusal(Anywhere(), url, *addresses) == ""


def test_a_prefix_or_a_network_opens_a_host_with_its_addresses() -> None:
    prefix, network = AddressPolicy(["http://127.1/"]), AddressPolicy(["10.0.0.0/8"])
    assert refusal(prefix, "http://127.1/x") == ""
    assert refusal(prefix, "http://127.1/x", "127.0.0.1", "10.0.0.1") == ""
    assert refusal(network, "http://host/", "10.0.0.1") == ""
    assert refusal(network, "http://host/", "10.0.0.1", "192.168.0.1") == "private_address"
    assert refusal(network, "http://host/") == "plaintext_refused"


def test_an_address_that_was_allowed_is_allowed_again_for_its_scheme_alone() -> None:
    policy = AddressPolicy(["fd00::/8"])
    for _ in range(2):
        assert refusal(policy, "https://host/", "8.8.8.8") == ""
        assert refusal(policy, "http://host/", "8.8.8.8") == "plaintext_refused"
        assert refusal(policy, "http://host/", "fd00::1") == ""


def test_a_url_that_an_entry_of_sources_refuses_is_not_requested_whatever_is_allowed() -> None:
    for policy in (AddressPolicy(["https://evil/"], verdicts=VERDICTS), AddressPolicy([], verdicts=VERDICTS)):
        for each in (policy, policy.also(["10.0.0.0/8"])):
            with pytest.raises(CachdError) as refused:
                each.check_url(urlsplit("https://evil/model"))
            assert refused.value.code == "source_refused"
            each.check_url(urlsplit("https://good/model"))


@pytest.mark.parametrize(
    "entry", ["https://u:hunter2@host/", "https://host/?q", "https://host/#f", "https://", "http://h:x/"]
)
def test_an_entry_that_is_no_plain_prefix_is_refused_and_no_password_repeated(entry: str) -> None:
    with pytest.raises(CachdError) as refused:
        AddressPolicy([entry])
    assert refused.value.code == "bad_option"
    assert "hunter2" not in f"{refused.value} {refused.value.hint}"
