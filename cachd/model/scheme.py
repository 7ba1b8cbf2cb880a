"""The table of schemes: one value describes one kind of source completely.

To add a scheme, add a value to `_ALL`, and the module that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from cachd.model.bucket import BucketGrammar
from cachd.model.grammar import Grammar
from cachd.model.hub import HUB_HOSTS, HubGrammar
from cachd.model.urls import UrlGrammar


@dataclass(frozen=True, slots=True)
class Scheme:
    """One scheme.

    `examples`: forms of its refs, for hints; empty if those of another scheme suffice. `module`: the module
    of its source, which is imported when the first ref needs it; the module's function `make` makes the
    source. `spellings`: other names that people write for the scheme. `hosts`: web servers that serve the
    same files by https.

    `columns`: the columns of the option `sources` that only some schemes have, each with the option that
    applies when no entry sets the column, or None. `ca_file`: the option that names its own certificate
    authorities.
    """

    name: str
    grammar: Grammar
    module: str
    examples: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    columns: Mapping[str, str | None] = field(default_factory=dict)
    ca_file: str | None = None


_ALL = (
    Scheme(
        "hf",
        HubGrammar("hf"),
        "cachd.sources.huggingface",
        examples=("hf://org/model[@revision]",),
        spellings=("huggingface", "hf-hub", "hf_hub", "hfhub"),
        hosts=HUB_HOSTS,
        columns={"endpoint": "hf_endpoint", "credentials": "hf_token_file"},
    ),
    Scheme(
        "ms",
        HubGrammar("ms"),
        "cachd.sources.modelscope",
        examples=("ms://org/model[@revision]",),
        spellings=("modelscope",),
        columns={"endpoint": "ms_endpoint", "credentials": "ms_token_file"},
    ),
    Scheme(
        "s3",
        BucketGrammar(),
        "cachd.sources.s3",
        examples=("s3://bucket/prefix/",),
        spellings=("s3a", "s3n"),
        columns={
            "endpoint": "s3_endpoint_url",
            "region": "s3_region",
            "credentials": None,
            "profile": None,
            "instance_role": None,
            "anonymous": None,
            "addressing": "s3_addressing",
            "requester_pays": None,
        },
        ca_file="s3_ca_file",
    ),
    Scheme(
        "https",
        UrlGrammar("https", 443),
        "cachd.sources.web",
        examples=("https://host/file", "https://host/dir/"),
        columns={"headers_file": None, "query_file": None},
    ),
    Scheme(
        "http",
        UrlGrammar("http", 80),
        "cachd.sources.web",
        columns={"headers_file": None, "query_file": None},
    ),
    Scheme("file", UrlGrammar("file"), "cachd.sources.shared_volume", examples=("file:///path",)),
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _ALL})

if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]  # pydantic accepts these names alone
