"""Answers what the option `sources` says about a ref: whether it may be pulled, and with which settings.

For each column, the longest prefix that covers the ref and sets the column applies. If there is none, the
daemon's own option applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cachd.errors import Forbidden, Invalid
from cachd.model import Digest, File, Manifest, count_text, matches
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.prefixes import Prefix, Prefixes
from cachd.policy.safe_formats import unsafe
from cachd.policy.verdicts import Rule, Verdicts
from cachd.sources.entries import SHA256, Entry, is_beneath, is_pattern, schemes_of
from cachd.sources.headers import HeadersFile
from cachd.sources.query import QueryFile
from cachd.sources.secrets import Secrets

_NO_ENDPOINTS: Mapping[str, Iterable[str]] = {}


@dataclass(frozen=True, slots=True)
class Held:
    """The value of a column for one ref, and the prefix and index in `sources` of the entry that sets it."""

    value: Any
    by: Prefix
    number: int


class Table:
    """The entries in force.

    `refuse` is the daemon's option of that name: patterns of files, and digests. `endpoints` are the URLs of
    the Hub and of S3 in the daemon's own options, by scheme.
    """

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        *,
        refuse: Iterable[str] = (),
        endpoints: Mapping[str, Iterable[str]] = _NO_ENDPOINTS,
    ) -> None:
        self.entries, refuse = tuple(entries), tuple(refuse)
        self._prefixes = Prefixes({e.prefix: (number, e) for number, e in enumerate(self.entries)})
        self._limits = Prefixes({e.prefix: e.limit for e in self.entries if e.limit is not None})
        self._headers = Prefixes({e.prefix: e.headers_file for e in self.entries if e.headers_file})
        self._queries = Prefixes({e.prefix: e.query_file for e in self.entries if e.query_file})
        rules = _rules(self.entries)
        self._verdicts = Verdicts(rules)
        self._web_servers = Prefixes(_web_servers(self.entries, rules, endpoints))
        self._patterns = tuple(item for item in refuse if not item.startswith(SHA256))
        every = [*refuse, *(item for entry in self.entries for item in entry.items("refuse"))]
        self.refused = frozenset(Digest.parse(item) for item in every if item.startswith(SHA256))

    # --- what may be pulled ---

    def check(self, base: str) -> None:
        """Raises Forbidden when an entry refuses a ref's base, or when servers may differ on its path."""
        refusal = self._verdicts.refusal(base)
        if refusal is None and not self._verdicts.allows_host(base):
            refusal = next((rule.by for _, rule in self._web_servers.covering(base)), None)
        if refusal:
            raise Forbidden(
                f"{base} is refused by the entry {refusal} of sources",
                code="source_refused",
                hint=f"cachd sources {base} shows what holds for it",
            )

    def check_files(self, manifest: Manifest) -> None:
        """Raises Forbidden when a file of the manifest is refused by its path, its origin or its digest."""
        found = [file.path for file in self._refused_files(manifest)]
        if found:
            raise Forbidden(
                f"{manifest.base} has {count_text(len(found), 'file')} that this node refuses:"
                f" {', '.join(found[:5])}",
                code="file_refused",
                hint=f"leave them out with exclude; cachd sources {manifest.base} shows what is refused",
            )
        self.check_digests(manifest)

    def only_safe(self, manifest: Manifest, *, asked: bool) -> Manifest:
        """The manifest without the pickles that no engine needs, where an entry says `formats: safe`.

        `asked`: the request says so, too. Raises Forbidden when the model has other pickles.
        """
        held = self.held(manifest.base).get("formats")
        is_held = held is not None and held.value == "safe"
        if not (asked or is_held):
            return manifest
        found = unsafe([file.path for file in manifest.files])
        spare = set(found.spare)
        kept = [file for file in manifest.files if file.path not in spare]
        if found.needed or not kept:
            named = found.needed or found.spare
            raise Forbidden(
                f"{manifest.base} has {count_text(len(named), 'file')} that can run code when loaded:"
                f" {', '.join(f'{path!r:.120}' for path in named[:5])}",
                code="unsafe_format",
                hint="look for the model as safetensors, or leave the files out with exclude; "
                + (f"the entry {held.by.text} of sources says" if held and is_held else "the request says")
                + " formats: safe",
            )
        return manifest.only(kept)

    def _refused_files(self, manifest: Manifest) -> Iterator[File]:
        is_split = self._prefixes.are_below(manifest.base)  # then each file is judged by its own origin
        refused, allowed = self.patterns(manifest.base)
        for file in manifest.files:
            if is_split:
                refused, allowed = self.patterns(file.origin)
            if (
                matches(file.path, refused)
                or (allowed and not matches(file.path, allowed))
                or (is_split and self._verdicts.refusal(file.origin))
            ):
                yield file

    def check_digests(self, manifest: Manifest) -> None:
        """Raises Forbidden when the digest of the model, or of one of its files, is refused."""
        if self.refused and (found := self.refused_in(manifest)):
            raise _refused_digest(found[0] or manifest.base, found[1])

    def check_digest(self, file: File, sha256: Digest) -> None:
        """Raises Forbidden when a file's digest is refused."""
        if sha256 in self.refused:
            raise _refused_digest(file.path, sha256)

    def refused_in(self, manifest: Manifest) -> tuple[str, Digest] | None:
        """Path and digest of the first refused file; the path is empty for the model's own revision."""
        if not self.refused:
            return None
        if len(manifest.revision) == 64 and Digest("sha256", manifest.revision) in self.refused:
            return "", Digest("sha256", manifest.revision)
        for file in manifest.files:
            if (known := file.known_sha256) in self.refused:
                return file.path, known
        return None

    def patterns(self, base: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The patterns of refused files, and those of allowed ones (none means all), below `base`."""
        refused: tuple[str, ...] = self._patterns
        allowed: tuple[str, ...] = ()
        for prefix, (_, entry) in reversed(self._prefixes.covering(base)):  # the longest comes last, and wins
            named = tuple(item for item in entry.items("refuse") if is_pattern(item, prefix))
            refused = () if entry.refuse is False else named or refused
            named = tuple(item for item in entry.items("allow") if is_pattern(item, prefix))
            allowed = () if entry.allow is True else named or allowed
        return refused, allowed

    # --- how it is requested ---

    def held(self, base: str) -> dict[str, Held]:
        """The columns that entries set for a ref's base or a file's origin.

        Credentials are for one endpoint. So an entry that sets an endpoint inherits none from the entries of
        shorter prefixes, and `anonymous` and credentials replace each other.
        """
        found: dict[str, Held] = {}
        for prefix, (number, entry) in reversed(self._prefixes.covering(base)):
            own = {column for column, _ in entry.set_columns()}
            if own & {"endpoint", "anonymous"}:
                for column in _CREDENTIALS:
                    found.pop(column, None)
            elif own & set(_CREDENTIALS):
                found.pop("anonymous", None)
            found |= {column: Held(value, prefix, number) for column, value in entry.set_columns()}
        return found

    def limits(self) -> Mapping[str, int]:
        """The limits of all entries in bytes a second, by the text of their prefix."""
        return {entry.prefix.text: entry.limit for entry in self.entries if entry.limit}

    def limited_by(self, origin: str) -> str:
        """The text of the prefix whose limit holds for a file's origin; empty when none does."""
        return next((prefix.text for prefix, rate in self._limits.covering(origin) if rate), "")

    def secrets(self, url: str) -> Secrets:
        """What a request of `url` carries. Raises Invalid when a file with it cannot be read."""
        headers = next((file for _, file in self._headers.covering(url)), None)
        query = next((file for _, file in self._queries.covering(url)), None)
        return Secrets(
            HeadersFile(headers).read() if headers else {}, QueryFile(query).read() if query else ""
        )

    def address_policy(self, allow: Iterable[str]) -> AddressPolicy:
        """The policy for requests: `allow` and what entries allow, without what they refuse."""
        return AddressPolicy([*allow, *self._verdicts.opened], verdicts=self._verdicts)


def _refused_digest(what: str, digest: Digest) -> Forbidden:
    return Forbidden(
        f"{what} is {digest}, which this node refuses",
        code="refused_digest",
        hint="pull another revision or model; the option refuse, or an entry of sources, lists this digest",
    )


_CREDENTIALS = ("credentials", "profile", "instance_role", "anonymous")


def _rules(entries: Iterable[Entry]) -> dict[Prefix, Rule]:
    """A rule for each entry's prefix, and for each organisation, bucket or host that an entry lists."""
    own: dict[Prefix, Rule] = {}
    allowed: dict[Prefix, Rule] = {}
    refused: dict[Prefix, Rule] = {}
    for entry in entries:
        listed = {"allow": allowed, "refuse": refused}
        for column, rules in listed.items():
            beneath = [item for item in entry.items(column) if is_beneath(item, entry.prefix)]
            rule = Rule(column == "allow", entry.prefix, opens=column == "allow")
            rules |= {Prefix.parse(entry.prefix.text + item): rule for item in beneath}
        verdict = _verdict(entry)
        if verdict is not None:
            own[entry.prefix] = Rule(verdict, entry.prefix, opens=bool(entry.allow))
    return allowed | own | refused


def _web_servers(
    entries: Iterable[Entry], rules: Mapping[Prefix, Rule], endpoints: Mapping[str, Iterable[str]]
) -> dict[Prefix, Rule]:
    """The URLs of Hubs and S3 servers that have refused models, each with one of the rules that refuse them.

    Refs with these URLs are refused. Otherwise the https:// URL of a file would get around a refusal of its
    hf:// or s3:// ref.
    """
    web_servers: dict[Prefix, Rule] = {}
    for scheme in schemes_of("endpoint"):
        refusing = [rule for prefix, rule in rules.items() if prefix.scheme == scheme and not rule.is_allowed]
        own = [e.endpoint for e in entries if e.prefix.scheme == scheme and e.endpoint]
        for url in (*endpoints.get(scheme, ()), *own) if refusing else ():
            with suppress(Invalid):
                web_servers[Prefix.parse(url)] = refusing[0]
    return web_servers


def _verdict(entry: Entry) -> bool | None:
    """Whether an entry allows everything that its prefix covers; None when it does not say."""
    allows_some = any(is_beneath(item, entry.prefix) for item in entry.items("allow"))
    if entry.refuse is True or entry.allow is False or allows_some:
        return False
    return True if entry.allow or entry.refuse is False else None
