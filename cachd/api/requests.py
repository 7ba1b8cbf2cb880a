"""The bodies that callers of the HTTP API send, checked by pydantic."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cachd.fields import Bytes, Rate, Seconds, Text
from cachd.model import FORMATS, NAME_PATTERN, Limits, ModelSpec, SchemeName

Include = Annotated[
    list[str],
    Field(
        max_length=1000,
        description="patterns of the files to pull, such as *.safetensors or dir/; empty: all files",
    ),
]
Exclude = Annotated[list[str], Field(max_length=1000, description="patterns of files not to pull")]
Form = Annotated[
    str | None,
    Field(
        max_length=100,
        description=f"the form of the weights to pull: all (default), {', '.join(FORMATS)}, or a quantisation"
        " such as gguf:Q4_K_M; other files are always pulled, too",
    ),
]


Formats = Annotated[
    Literal["all", "safe"] | None,
    Field(
        description="safe: leave out Python pickles that have safetensors beside them, and refuse the model"
        " if it needs others; default: as the entry of `sources` says, which no request can weaken"
    ),
]
Copied = Annotated[
    list[str] | None,
    Field(
        max_length=1000,
        description="patterns of the files that the views show as copies, not as hard links; default:"
        " external data of ONNX, which onnx.load refuses otherwise; empty: none",
    ),
]
Arranged = Annotated[
    Literal["triton"] | None,
    Field(
        description="triton: the plain view has config.pbtxt and 1/FILES, as a model repository of Triton"
        " needs it; default: the files are where the source has them"
    ),
]


class Asked(BaseModel):
    """The body of POST /v1/models."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"ref": "hf://org/model@main", "exclude": ["*.bin"]}]}
    )

    ref: str = Field(
        description="where the model comes from: org/model[@revision] or org/model/file on the Hugging Face"
        " Hub, also as a huggingface.co URL; s3://bucket/prefix/, https://host/file, https://host/dir/"
        " or file:///path"
    )
    name: str | None = Field(
        None,
        description=f"the model's name on this node, matching {NAME_PATTERN}; default: derived from the ref",
    )
    include: Include = []
    exclude: Exclude = []
    weights: Form = None
    formats: Formats = None
    copied: Copied = Field(None, alias="copy")
    layout: Arranged = None
    hub_id: str | None = Field(
        None,
        description="for a ref outside the Hub: the Hub ID (org/model) under which the Hub view shows this"
        " model",
    )
    pin: bool = Field(
        default=False,
        description="pin the model: until it is unpinned, it is never evicted, and only a forced delete"
        " removes it",
    )
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="pulls with a higher priority go first, and their models are evicted later",
    )
    refresh: bool = Field(
        default=False, description="ask the source again what the ref points to, even when the model is ready"
    )
    replace: bool = Field(
        default=False,
        description="take the name even if it belongs to another model or is pinned, and cancel any other"
        " pull that runs under it",
    )

    def spec(self) -> ModelSpec:
        """The spec of the requested model. Raises Invalid."""
        return ModelSpec.asked(
            self.ref,
            self.name,
            self.include,
            self.exclude,
            hub_id=self.hub_id,
            weights=self.weights,
            copy=self.copied,
            formats=self.formats,
            layout=self.layout,
        )


class AskedResolve(BaseModel):
    """The body of POST /v1/resolve. All but `seconds` is written as in POST /v1/models."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"ref": "hf://org/model@main"}]}
    )

    ref: str = Field(description="where the model would come from")
    name: str | None = Field(None, description="the name that it would have; default: derived from the ref")
    include: Include = []
    exclude: Exclude = []
    weights: Form = None
    formats: Formats = None
    seconds: Seconds = Field(60.0, gt=0, le=600, description="how long the source may take")

    def spec(self) -> ModelSpec:
        """The spec of the model. Raises Invalid."""
        return ModelSpec.asked(
            self.ref, self.name, self.include, self.exclude, weights=self.weights, formats=self.formats
        )


class AskedLease(BaseModel):
    """The body of the calls that take (POST) and renew (PUT) a lease."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"seconds": 600, "holder": "pod/vllm-0"}]}
    )

    seconds: Seconds = Field(gt=0, le=7 * 86400, description="how long the lease lasts from now")
    holder: Text = Field("", max_length=200, description="who holds the lease, for people to read")


class AskedSize(BaseModel):
    """The body of POST /v1/evictions: the space to make available. Set exactly one of `bytes` and `ref`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"bytes": "40GB"}]})

    bytes: Bytes | None = Field(None, description="the space to make available, such as 40GB")
    ref: str | None = Field(
        None, description="make available what a pull of this ref needs; written as in POST /v1/models"
    )
    include: Include = []
    exclude: Exclude = []
    weights: Form = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Self:
        if (self.bytes is None) == (self.ref is None):
            raise ValueError("write either bytes or ref")
        return self

    def spec(self) -> ModelSpec | None:
        """The spec of the model to make space for; None when `bytes` is set. Raises Invalid."""
        if self.ref is None:
            return None
        return ModelSpec.asked(self.ref, None, self.include, self.exclude, weights=self.weights)


class AskedLimits(BaseModel):
    """The body of PUT /v1/limits."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"bytes_per_second": 500_000_000, "sources": {"hf": "200MB"}}]},
    )

    bytes_per_second: Rate | None = Field(
        None, description="limit for all sources together; null or 0: no limit"
    )
    sources: dict[SchemeName, Rate | None] = Field(
        {},
        description="limit in bytes per second for each kind of source: hf, ms, s3, https, http, file;"
        " null or 0: no limit",
    )

    def limits(self) -> Limits:
        """The limits that the caller asks for. Raises Invalid."""
        return Limits.of(self.bytes_per_second, self.sources.items())


class AskedSweep(BaseModel):
    """The body of POST /v1/sweeps. It may be omitted."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"dry_run": True}]})

    dry_run: bool = Field(default=False, description="show what would be removed, and remove nothing")
    everything: bool = Field(
        default=False,
        description="also remove what ended pulls left behind recently, instead of keeping it for a retry",
    )
