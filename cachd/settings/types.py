"""Defines the types of options. Each reads the text of a file or a variable."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from cachd.errors import Invalid
from cachd.fields import Rate
from cachd.model import Digest, Percentage, SchemeName, percentage_of, size_or_percent_of
from cachd.model.listener import Address, Listener
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import ENVIRONMENT, Exemption, Proxy
from cachd.settings.file import parse

_KUBELET = re.compile(r"https://[0-9A-Za-z.:\[\]_-]{1,260}:[0-9]{1,5}/?")

_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_TAINT_KEY = re.compile(
    r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)


def _several(value: object) -> object:
    """A list or mapping from one text: YAML such as `[a, b]` or `{a: 1}`, or words with commas as `a, b`."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        try:
            return parse(value)
        except Invalid as error:
            raise ValueError(error.detail) from error
    return [each.strip() for each in value.split(",") if each.strip()]


def _pairs(value: object) -> object:
    found = _several(value)
    if not isinstance(value, str) or not isinstance(found, list):
        return found
    pairs = (str(pair).partition("=") for pair in found)
    return {key.strip(): text.strip() for key, _, text in pairs}


def listens(value: object) -> object:
    """One or several addresses. `[::]:8470` is an IPv6 address and not a YAML list."""
    if isinstance(value, str) and re.match(r"\s*\[[0-9A-Fa-f:.]+\]:", value):
        return [each.strip() for each in value.split(",")]
    return [str(value)] if isinstance(value, int) else _several(value)


def _hub_listen(text: str) -> str:
    """An address of the Hub endpoint. `:8471` stands for all IPv4 addresses of the node."""
    full = f"0.0.0.0{text}" if text.startswith(":") else text  # noqa: S104 - as the operator asks
    at: object = None
    with suppress(Invalid):
        at = Listener.parse(full).at
    if not isinstance(at, Address) or full != str(at):
        raise ValueError("write HOST:PORT, such as 10.0.0.7:8471 or [::]:8471, or :PORT")
    return full


def _network(text: str) -> str:
    try:
        return str(ip_network(text))
    except ValueError as error:
        raise ValueError("write an address or a network, such as 10.244.0.0/16") from error


def _text_for(parse: Callable[[str], object]) -> AfterValidator:
    """Accepts the texts that `parse` reads, and keeps them as they are."""

    def check(text: str) -> str:
        try:
            parse(text)
        except Invalid as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(check)


def _size_or_percent_or_auto(value: object) -> int | Percentage | Literal["auto"]:
    return "auto" if isinstance(value, str) and value.strip().lower() == "auto" else size_or_percent_of(value)


def _check_proxy(url: str) -> None:
    if url != ENVIRONMENT and Proxy.parse(url).credentials is not None:
        raise ValueError("contains a password: write user:password to proxy_credentials_file instead")


def _check_refusal(item: str) -> None:
    if item.startswith("sha256:"):
        Digest.parse(item)


def _kubelet_url(value: str) -> str:
    if not _KUBELET.fullmatch(value):
        raise ValueError("write https://HOST:PORT, such as https://10.0.0.7:10250")
    return value


def _node_name(value: str) -> str:
    if not _NODE_NAME.fullmatch(value):
        raise ValueError("write the name of a node: lower-case letters, digits, '-' and '.'")
    return value


def _taint_key(value: str) -> str:
    if not _TAINT_KEY.fullmatch(value):
        raise ValueError("write the key of a taint, such as cachd.dev/models-not-ready, without an effect")
    return value


SizeOrPercent = Annotated[int | Percentage, PlainValidator(size_or_percent_of)]
SizeOrPercentOrAuto = Annotated[int | Percentage | Literal["auto"], PlainValidator(_size_or_percent_or_auto)]
Percent = Annotated[Percentage, PlainValidator(percentage_of)]
Signal = Literal[
    "nodefs.available",
    "nodefs.inodesFree",
    "imagefs.available",
    "imagefs.inodesFree",
    "containerfs.available",
    "containerfs.inodesFree",
]
Thresholds = Annotated[dict[Signal, SizeOrPercent], BeforeValidator(_pairs)]
KubeletUrl = Annotated[str, AfterValidator(_kubelet_url)]
NodeName = Annotated[str, AfterValidator(_node_name)]
TaintKey = Annotated[str, AfterValidator(_taint_key)]
Rates = Annotated[dict[SchemeName, Rate], BeforeValidator(_pairs)]
Several = BeforeValidator(_several)
HubListens = Annotated[tuple[Annotated[str, AfterValidator(_hub_listen)], ...], BeforeValidator(listens)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], Several]
Strings = Annotated[tuple[str, ...], Several]
Reachable = Annotated[tuple[Annotated[str, _text_for(lambda entry: AddressPolicy([entry]))], ...], Several]
Refusals = Annotated[tuple[Annotated[str, _text_for(_check_refusal)], ...], Several]
Exemptions = Annotated[tuple[Annotated[str, _text_for(Exemption.parse)], ...], Several]
ProxyUrl = Annotated[str, _text_for(_check_proxy)]
Listens = Annotated[
    tuple[Annotated[str, _text_for(Listener.parse)], ...],
    BeforeValidator(listens),
    Field(min_length=1, max_length=16),
]


def Word(others: Mapping[str, str] | None = None) -> BeforeValidator:  # noqa: N802 stands where a type does
    """A word of the type's list, in any case. `others` maps other spellings to words of the list."""

    def plain(value: object) -> object:
        word = value.strip().lower() if isinstance(value, str) else value
        return (others or {}).get(str(word), word)

    return BeforeValidator(plain)
