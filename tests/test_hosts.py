"""A Host header names this daemon by one of its names, or by any address."""

from __future__ import annotations

import pytest

from cachd.policy.hosts import OwnNames

OWN = OwnNames(["Cachd.storage"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8470",
        "localhost:",
        "cachd.storage",
        "CACHD.STORAGE:80",
        "127.0.0.1",
        "10.0.0.1:8470",
        "[::1]",
        "[2001:DB8::1]:8470",
    ],
)
def test_its_names_and_every_address_are_its_own_with_any_port(host: str) -> None:
    assert OWN.has(host) is True
    assert OWN.has(host) is True, "also when it is asked again"


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":80",
        "evil.example",
        "cachd.storage.evil.example",
        "localhost.",
        "localhost:80:80",
        "localhost:x",
        "user@localhost",
        "localhost/",
        "[::1",
        "::1]",
        "[localhost]",
        "[::g]",
        "127.0.0.1.evil.example",
    ],
)
def test_no_other_host_is_its_own(host: str) -> None:
    assert OWN.has(host) is False


def test_a_name_is_read_up_to_300_characters() -> None:
    longest = OwnNames(["a" * 300, "b" * 301])
    assert longest.has("a" * 300) is True
    assert longest.has("b" * 301) is False
    assert longest.allowed == {"a" * 300, "b" * 301, "localhost"}
