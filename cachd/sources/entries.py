"""Defines the entries of the option `sources`: a field for each column, and the values that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

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

from cachd.errors import Invalid
from cachd.fields import AbsolutePath, Rate, plain_url
from cachd.model import SCHEMES, Digest
from cachd.policy.prefixes import Prefix

MAX_ENTRIES = 1000
_MAX_ITEMS, _LONGEST_ITEM = 1000, 512
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SHA256 = "sha256:"


def _prefix(typed: object) -> Prefix:
    if isinstance(typed, Prefix):
        return typed
    try:
        return Prefix.parse(typed if isinstance(typed, str) else "")
    except Invalid as error:
        raise ValueError(str(error)) from error


def _flag_or_items(value: object) -> object:
    """A flag or a tuple of texts. Raises ValueError."""
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, bool) or word in (*_TRUE, *_FALSE):
        return word is True or word in _TRUE
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(each, str) for each in items):
        raise ValueError("is neither true nor false, nor a list")
    items = tuple(each.strip() for each in items if each.strip())
    if len(items) > _MAX_ITEMS or any(len(each) > _LONGEST_ITEM for each in items):
        raise ValueError(
            f"has more than {_MAX_ITEMS} items, or an item of more than {_LONGEST_ITEM} characters"
        )
    return items


def _flag(value: object) -> object:
    """The flag that a word means; any other value as it is, for pydantic to judge."""
    word = value.strip().lower() if isinstance(value, str) else value
    return word in _TRUE if word in (*_TRUE, *_FALSE) and isinstance(word, str) else word


Addressing = Literal["auto", "path", "virtual"]
Formats = Literal["all", "safe"]
FlagOrItems = Annotated[bool | tuple[str, ...], BeforeValidator(_flag_or_items)]


class Entry(BaseModel):
    """One entry of `sources`: the settings for what a prefix covers."""

    # defer_build: pydantic builds the model at its first entry, and most configurations have none.
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, defer_build=True)

    prefix: Annotated[Prefix, BeforeValidator(_prefix)] = Field(
        description="what the entry applies to: `hf://`, `hf://org/`, `hf://org/model`, `s3://bucket/x/`,"
        " `https://host:8443/path/`, `file:///shares/a/`"
    )
    allow: FlagOrItems | None = Field(
        None,
        description="`true`: models from here may be pulled, even from a private host or over plain http;"
        " if the prefix is only a scheme, a list of `org/`, `bucket/` or `host/`: only these may be pulled;"
        " a list of patterns: only files that match one",
    )
    refuse: FlagOrItems | None = Field(
        None,
        description="`true`: nothing from here may be pulled; a list: none of these `org/`, `bucket/` or"
        " `host/`, no file that matches one of these patterns, and no file of these `sha256:…` from any"
        " source",
    )
    endpoint: Annotated[str | None, AfterValidator(lambda v: v and plain_url(v))] = Field(
        None, description="URL of the Hub or the S3 server"
    )
    region: str | None = Field(None, description="S3 region that requests are signed for")
    credentials: AbsolutePath | None = Field(
        None,
        description="Hub: a file with the token; S3: a credentials file as AWS clients use it; re-read,"
        " so that it may rotate",
    )
    profile: str | None = Field(
        None, description="S3: profile of the file `credentials`, or else of the node's AWS files"
    )
    headers_file: AbsolutePath | None = Field(
        None,
        description="a file of `Name: value` lines, such as Authorization, sent to this host alone;"
        " re-read at every use",
    )
    query_file: AbsolutePath | None = Field(
        None,
        description="a file with one line of `name=value&…`, such as a signature, added to the URLs below"
        " this prefix alone; re-read at every use",
    )
    formats: Formats | None = Field(
        None,
        description="`safe`: a model whose weights are only Python pickles is refused, and pickles with"
        " safetensors beside them are left out; `all`: every format may be pulled",
    )
    limit: Rate | None = Field(
        None, description="most bytes a second from here, in addition to the other limits"
    )
    instance_role: Annotated[bool | None, BeforeValidator(_flag)] = Field(
        None, description="take credentials from the machine's metadata service"
    )
    anonymous: Annotated[bool | None, BeforeValidator(_flag)] = Field(
        None, description="send requests without credentials, as `--no-sign-request` of the AWS CLI does"
    )
    addressing: Addressing | None = Field(
        None,
        description="how URLs name the bucket: `path` (host/bucket/key), `virtual` (bucket.host/key), or"
        " `auto`: as the server wants it",
    )
    requester_pays: Annotated[bool | None, BeforeValidator(_flag)] = Field(
        None, description="let the owner of these credentials pay for requests and bytes"
    )

    @field_validator("*")
    @classmethod
    def _of_scheme(cls, value: object, info: ValidationInfo) -> object:
        prefix, schemes = info.data.get("prefix"), schemes_of(str(info.field_name))
        if value is not None and isinstance(prefix, Prefix) and prefix.scheme not in schemes:
            raise ValueError(f"is for {' and '.join(f'{each}://' for each in schemes)} alone")
        return value

    @field_validator("allow", "refuse")
    @classmethod
    def _items(cls, value: object, info: ValidationInfo) -> object:
        prefix = info.data.get("prefix")
        if isinstance(value, tuple) and isinstance(prefix, Prefix):
            for item in value:
                _check_item(item, prefix, is_refused=info.field_name == "refuse")
        return value

    @model_validator(mode="after")
    def _anonymous_alone(self) -> Self:
        if self.anonymous and (self.credentials or self.profile or self.instance_role):
            raise ValueError("anonymous sends no credentials: remove credentials, profile and instance_role")
        return self

    @model_validator(mode="after")
    def _one_verdict(self) -> Self:
        if self.allow in (True, False) and self.allow == self.refuse:
            raise ValueError("allow and refuse say opposite things")
        return self

    def items(self, column: str) -> tuple[str, ...]:
        """The list in a column; empty when the column holds a flag or nothing."""
        value = getattr(self, column)
        return value if isinstance(value, tuple) else ()

    def set_columns(self) -> Iterator[tuple[str, Any]]:
        """The columns that this entry sets, each with its value."""
        return ((name, v) for name in COLUMNS if (v := getattr(self, name)) is not None)


COLUMNS = tuple(name for name in Entry.model_fields if name != "prefix")


def schemes_of(column: str) -> tuple[str, ...]:
    """The schemes that a column applies to."""
    return tuple(name for name, scheme in SCHEMES.items() if column in scheme.columns) or tuple(SCHEMES)


def columns() -> Iterator[tuple[str, str, str]]:
    """Name, schemes and description of every column, for the documentation."""
    for name in COLUMNS:
        schemes = "all" if schemes_of(name) == tuple(SCHEMES) else ", ".join(schemes_of(name))
        yield name, schemes, Entry.model_fields[name].description or ""


def is_beneath(item: str, prefix: Prefix) -> bool:
    """Whether an item names an organisation, bucket or host: `org/` in an entry for a scheme alone."""
    return not prefix.steps and item.endswith("/") and not set(item[:-1]) & set("/*?[")


def is_pattern(item: str, prefix: Prefix) -> bool:
    """Whether an item is a pattern of file names."""
    return not item.startswith(SHA256) and not is_beneath(item, prefix)


def _check_item(item: str, prefix: Prefix, *, is_refused: bool) -> None:
    """Raises ValueError for an item that is malformed or ambiguous."""
    try:
        if item.startswith(SHA256):
            Digest.parse(item)
            if not is_refused:
                raise ValueError("a digest can be refused, not allowed")
        elif is_beneath(item, prefix):
            Prefix.parse(prefix.text + item)
        elif not prefix.steps and not set(item) & set("/*?["):
            raise ValueError(f"{item!r:.80} may be a name or a file: write {item:.80}/ or '*{item:.80}'")
    except Invalid as error:
        raise ValueError(str(error)) from error


def doubled(entries: Iterable[Entry]) -> Iterator[tuple[int, int]]:
    """The indexes of entries that repeat the prefix of an earlier one, each after the index of that one."""
    first: dict[Prefix, int] = {}
    for number, entry in enumerate(entries):
        if first.setdefault(entry.prefix, number) != number:
            yield first[entry.prefix], number
