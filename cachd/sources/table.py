"""`sources:`, one table for what belongs to a prefix. The longest prefix of a ref wins, column by column.

An entry is its prefix and the columns it sets; `Entry` has one field for each column. What no entry sets is
as the options of the whole daemon say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cachd.errors import Forbidden, Invalid
from cachd.fields import Rate
from cachd.model import SCHEMES, Digest, File, Manifest, Ref, matches
from cachd.policy.prefixes import Prefix, Prefixes
from cachd.policy.reach import Reach
from cachd.policy.verdicts import Rule, Verdicts

MOST_ENTRIES = 1000
_MOST_ITEMS, _LONGEST_ITEM = 1000, 512
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SHA256 = "sha256:"


@dataclass(frozen=True, slots=True)
class Of:
    """The schemes that a column is for."""

    schemes: tuple[str, ...]


def _prefix(typed: object) -> Prefix:
    if isinstance(typed, Prefix):
        return typed
    try:
        return Prefix.parse(typed if isinstance(typed, str) else "")
    except Invalid as error:
        raise ValueError(str(error)) from error


def _flag_or_items(value: object) -> object:
    """A flag, or a list of texts."""
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, bool) or word in (*_TRUE, *_FALSE):
        return word is True or word in _TRUE
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(each, str) for each in items):
        raise ValueError("is neither true nor false, nor a list")
    items = tuple(each.strip() for each in items if each.strip())
    if len(items) > _MOST_ITEMS or any(len(each) > _LONGEST_ITEM for each in items):
        raise ValueError(f"has more than {_MOST_ITEMS} items, or one of more than {_LONGEST_ITEM} characters")
    return items


def _flag(value: object) -> object:
    word = value.strip().lower() if isinstance(value, str) else value
    return word in _TRUE if word in (*_TRUE, *_FALSE) and isinstance(word, str) else word


def _origin(value: str) -> str:
    try:
        url = urlsplit(value)
        is_plain = url.scheme in ("http", "https") and url.hostname and not (url.query or url.fragment)
        if is_plain and "@" not in url.netloc and url.port != 0:
            return value
    except ValueError:  # of a port or an address that is none
        pass
    raise ValueError("write https://HOST[:PORT][/PATH], with no user, password or query")


FlagOrItems = Annotated[bool | tuple[str, ...], BeforeValidator(_flag_or_items)]


class Entry(BaseModel):
    """One entry of `sources`: what belongs to a prefix."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    prefix: Annotated[Prefix, BeforeValidator(_prefix)] = Field(
        description="what the entry is about: `hf://`, `hf://org/`, `hf://org/model`, `s3://bucket/x/`,"
        " `https://host:8443/path/`, `file:///shares/a/`"
    )
    allow: Annotated[FlagOrItems | None, Of(SCHEMES)] = Field(
        None,
        description="`true`: models from here may be pulled, and the host may be private or plain http;"
        " a list of `org/`, `bucket/` or `host/` after a scheme alone: no others; a list of patterns: no"
        " other files",
    )
    refuse: Annotated[FlagOrItems | None, Of(SCHEMES)] = Field(
        None,
        description="`true`: nothing from here; a list: these `org/`, `bucket/` or `host/`, these patterns of"
        " files, and these `sha256:…` from anywhere",
    )
    endpoint: Annotated[str | None, AfterValidator(lambda v: v and _origin(v)), Of(("hf", "s3"))] = Field(
        None, description="the Hub or the S3 server to ask"
    )
    region: Annotated[str | None, Of(("s3",))] = Field(None, description="region to sign for")
    credentials: Annotated[Path | None, Of(("hf", "s3"))] = Field(
        None,
        description="Hub: a file with the token; S3: a file as AWS clients have it; re-read as it rotates",
    )
    profile: Annotated[str | None, Of(("s3",))] = Field(
        None, description="S3: profile of `credentials`, or of the AWS files of this node"
    )
    headers_file: Annotated[Path | None, Of(("https", "http"))] = Field(
        None,
        description="a file of `Name: value` lines, such as Authorization, sent to this host alone;"
        " re-read as it rotates",
    )
    limit: Annotated[Rate | None, Of(SCHEMES)] = Field(
        None, description="most bytes a second from here, beside the other limits"
    )
    instance_role: Annotated[bool | None, BeforeValidator(_flag), Of(("s3",))] = Field(
        None, description="ask the machine's metadata service for keys"
    )

    @field_validator("*")
    @classmethod
    def _of_scheme(cls, value: object, told: ValidationInfo) -> object:
        prefix, schemes = told.data.get("prefix"), schemes_of(str(told.field_name))
        if value is not None and isinstance(prefix, Prefix) and prefix.scheme not in schemes:
            raise ValueError(f"is for {' and '.join(f'{each}://' for each in schemes)} alone")
        return value

    @field_validator("allow", "refuse")
    @classmethod
    def _items(cls, value: object, told: ValidationInfo) -> object:
        prefix = told.data.get("prefix")
        if isinstance(value, tuple) and isinstance(prefix, Prefix):
            for item in value:
                _check_item(item, prefix, is_refused=told.field_name == "refuse")
        return value

    @model_validator(mode="after")
    def _one_verdict(self) -> Self:
        if self.allow in (True, False) and self.allow == self.refuse:
            raise ValueError("allow and refuse say opposite things")
        return self

    def items(self, column: str) -> tuple[str, ...]:
        value = getattr(self, column)
        return value if isinstance(value, tuple) else ()

    def set_columns(self) -> Iterator[tuple[str, Any]]:
        """The columns it sets, each with its value."""
        return ((name, v) for name in COLUMNS if (v := getattr(self, name)) is not None)


COLUMNS = tuple(name for name in Entry.model_fields if name != "prefix")


def schemes_of(column: str) -> tuple[str, ...]:
    """The schemes that a column is for."""
    of = (fact for fact in Entry.model_fields[column].metadata if isinstance(fact, Of))
    return next((each.schemes for each in of), SCHEMES)


def columns() -> Iterator[tuple[str, str, str]]:
    """(column, the schemes it is for, what it says) of every column, for the documentation."""
    for name in COLUMNS:
        schemes = "all" if schemes_of(name) == SCHEMES else ", ".join(schemes_of(name))
        yield name, schemes, Entry.model_fields[name].description or ""


def _is_beneath(item: str, prefix: Prefix) -> bool:
    """Whether an item is an organisation, a bucket or a host: `org/` after a scheme alone."""
    return not prefix.steps and item.endswith("/") and not set(item[:-1]) & set("/*?[")


def _is_pattern(item: str, prefix: Prefix) -> bool:
    return not item.startswith(_SHA256) and not _is_beneath(item, prefix)


def _check_item(item: str, prefix: Prefix, *, is_refused: bool) -> None:
    """Raises ValueError for an item that says nothing, or may say two things."""
    try:
        if item.startswith(_SHA256):
            Digest.parse(item)
            if not is_refused:
                raise ValueError("a digest can be refused, not allowed")
        elif _is_beneath(item, prefix):
            Prefix.parse(prefix.text + item)
        elif not prefix.steps and not set(item) & set("/*?["):
            raise ValueError(f"{item!r:.80} may be a name or a file: write {item:.80}/ or '*{item:.80}'")
    except Invalid as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Held:
    """The value of a column for one ref, and the entry that sets it, which is the `number`th."""

    value: Any
    by: Prefix
    number: int


class Table:
    """The entries in force. `refuse`: what the option of that name refuses, patterns of files and digests."""

    def __init__(self, entries: Iterable[Entry] = (), *, refuse: Iterable[str] = ()) -> None:
        self.entries, refuse = tuple(entries), tuple(refuse)
        self._prefixes = Prefixes({e.prefix: (number, e) for number, e in enumerate(self.entries)})
        self._verdicts = Verdicts(_rules(self.entries))
        self._patterns = tuple(item for item in refuse if not item.startswith(_SHA256))
        every = [*refuse, *(item for entry in self.entries for item in entry.items("refuse"))]
        self.refused = frozenset(Digest.parse(item) for item in every if item.startswith(_SHA256))

    # --- what may be pulled ---

    def check(self, base: str) -> None:
        """Raises Forbidden when nothing may be pulled from a ref's base, or its path may mean two things."""
        refusal = self._verdicts.refusal(base)
        if refusal:
            raise Forbidden(
                f"{base} is refused by the entry {refusal} of sources",
                code="source_refused",
                mend=f"cachd sources {base} shows what holds for it",
            )

    def check_files(self, manifest: Manifest) -> None:
        """Raises Forbidden for files that may not be pulled: by pattern, by place, by digest."""
        refused, allowed = self.patterns(manifest.base)
        manifest.check_without(refused)
        others = [f.path for f in manifest.files if allowed and not matches(f.path, allowed)]
        if self._verdicts.split(manifest.base):
            others += [f.path for f in manifest.files if self._verdicts.refusal(f.origin)]
        if others:
            raise Forbidden(
                f"{manifest.base} has {len(others)} files that sources does not allow:"
                f" {', '.join(others[:5])}",
                code="file_refused",
                mend=f"leave them out with exclude; cachd sources {manifest.base} shows what is allowed",
            )
        self.check_digests(manifest)

    def check_digests(self, manifest: Manifest) -> None:
        """Raises Forbidden when the model, or one of its files, has a digest that is refused."""
        if self.refused and (found := self.refused_in(manifest)):
            raise _refused_digest(found[0] or manifest.base, found[1])

    def check_digest(self, file: File, sha256: Digest) -> None:
        """Raises Forbidden when a file's digest is refused."""
        if sha256 in self.refused:
            raise _refused_digest(file.path, sha256)

    def refused_in(self, manifest: Manifest) -> tuple[str, Digest] | None:
        """The first file whose digest is refused; an empty path for the model's own revision."""
        if not self.refused:
            return None
        if len(manifest.revision) == 64 and Digest("sha256", manifest.revision) in self.refused:
            return "", Digest("sha256", manifest.revision)
        for file in manifest.files:
            for digest in filter(None, (file.digest, file.blob)):
                if digest in self.refused:
                    return file.path, digest
        return None

    def patterns(self, base: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of the files below a ref's base: the patterns refused, and those allowed (all, when empty)."""
        refused: tuple[str, ...] = self._patterns
        allowed: tuple[str, ...] = ()
        for prefix, (_, entry) in reversed(self._prefixes.covering(base)):  # the longest has the last word
            named = tuple(item for item in entry.items("refuse") if _is_pattern(item, prefix))
            refused = () if entry.refuse is False else named or refused
            named = tuple(item for item in entry.items("allow") if _is_pattern(item, prefix))
            allowed = () if entry.allow is True else named or allowed
        return refused, allowed

    # --- how it is asked for ---

    def held(self, base: str) -> dict[str, Held]:
        """The columns that entries set for a ref's base.

        Credentials belong to the endpoint that they were given for: an entry that names an endpoint takes
        none of a shorter one.
        """
        found: dict[str, Held] = {}
        for prefix, (number, entry) in reversed(self._prefixes.covering(base)):
            if entry.endpoint is not None:
                for column in _CREDENTIALS:
                    found.pop(column, None)
            found |= {column: Held(value, prefix, number) for column, value in entry.set_columns()}
        return found

    def limits(self) -> Mapping[str, int]:
        """Bytes a second, by the text of the prefix."""
        return {entry.prefix.text: entry.limit for entry in self.entries if entry.limit}

    def limited_by(self, ref: Ref) -> str:
        """The prefix whose limit holds for a ref; empty when there is none."""
        held = self.held(ref.base).get("limit")
        return held.by.text if held and held.value else ""

    def reach(self, allow: Iterable[str]) -> Reach:
        """What requests may reach: `allow`, what entries allow of hosts and shares, less what they refuse."""
        return Reach([*allow, *self._verdicts.opened], verdicts=self._verdicts)


def _refused_digest(what: str, digest: Digest) -> Forbidden:
    return Forbidden(
        f"{what} is {digest}, which this node refuses",
        code="refused_digest",
        mend="take another revision or model; `refuse` of the options, or of `sources`, names the digest",
    )


_CREDENTIALS = ("credentials", "profile", "instance_role")


def _rules(entries: Iterable[Entry]) -> dict[Prefix, Rule]:
    """What each entry says of its own prefix, and of the organisations, buckets or hosts that it lists."""
    own: dict[Prefix, Rule] = {}
    allowed: dict[Prefix, Rule] = {}
    refused: dict[Prefix, Rule] = {}
    for entry in entries:
        listed = {"allow": allowed, "refuse": refused}
        for column, rules in listed.items():
            beneath = [item for item in entry.items(column) if _is_beneath(item, entry.prefix)]
            rule = Rule(column == "allow", entry.prefix, opens=column == "allow")
            rules |= {Prefix.parse(entry.prefix.text + item): rule for item in beneath}
        verdict = _verdict(entry)
        if verdict is not None:
            own[entry.prefix] = Rule(verdict, entry.prefix, opens=bool(entry.allow))
    return allowed | own | refused


def _verdict(entry: Entry) -> bool | None:
    """Whether all that an entry's prefix covers is allowed; None when it does not say."""
    allows_some = any(_is_beneath(item, entry.prefix) for item in entry.items("allow"))
    if entry.refuse is True or entry.allow is False or allows_some:
        return False
    return True if entry.allow or entry.refuse is False else None


def doubled(entries: Iterable[Entry]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers of entries that have the same prefix."""
    first: dict[Prefix, int] = {}
    for number, entry in enumerate(entries):
        if first.setdefault(entry.prefix, number) != number:
            yield first[entry.prefix], number
