"""Lists the endpoints that this node's options name, and whether each is more than a default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from cachd.config import Config, Loaded
from cachd.model import SCHEMES, Ref
from cachd.sources.entries import Entry

_AWS = "https://s3.amazonaws.com"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that models come from. `is_named`: an option, an entry or a model asks for it.

    `model_url`: the URL of a model there, if a ref names the server; the address policy must allow it.
    """

    url: str
    scheme: str
    is_named: bool
    model_url: str | None = None

    @property
    def host(self) -> str:
        """The name or address of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port of the server."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)


def endpoints_of(loaded: Loaded) -> list[Endpoint]:
    """Each endpoint once, in the order of schemes: named ones, and the default of the Hub."""
    found: dict[str, Endpoint] = {}
    for each in _all(loaded):
        known = found.get(each.url)
        found[each.url] = each if known is None or each.is_named else known
    return list(found.values())


def refs_of(config: Config, scheme: str) -> list[Ref]:
    """The refs of `models` that have this scheme."""
    refs = (model.spec.ref for model in config.models)
    return [ref for ref in refs if ref.scheme == scheme]


def _all(loaded: Loaded) -> Iterator[Endpoint]:
    config = loaded.config
    for scheme, about in SCHEMES.items():
        yield from _own(config.sources, scheme)
        option = about.columns.get("endpoint")
        if option:
            is_named = _is_named(loaded, scheme, option)
            if is_named or scheme == "hf":
                yield Endpoint(getattr(config, option) or _aws(config), scheme, is_named)
        if about.grammar.has_host:
            for ref in refs_of(config, scheme):
                yield Endpoint(_origin(ref.base), scheme, is_named=True, model_url=ref.base)


def _own(entries: Iterable[Entry], scheme: str) -> Iterator[Endpoint]:
    """The endpoints of the entries of a scheme."""
    for entry in entries:
        if entry.endpoint and entry.prefix.scheme == scheme:
            yield Endpoint(entry.endpoint, scheme, is_named=True)


def _is_named(loaded: Loaded, scheme: str, option: str) -> bool:
    """Whether the options ask for the endpoint of a scheme."""
    options = [name for name in SCHEMES[scheme].columns.values() if name]
    is_used = any(entry.prefix.scheme == scheme and not entry.endpoint for entry in loaded.config.sources)
    is_set = any(name in loaded.given.settings for name in (option, *options) if name != "s3_addressing")
    return is_set or is_used or bool(refs_of(loaded.config, scheme))


def _aws(config: Config) -> str:
    return f"https://s3.{config.s3_region}.amazonaws.com" if config.s3_region else _AWS


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
