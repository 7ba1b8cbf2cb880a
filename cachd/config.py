"""Defines every option of the daemon once: its name, type, default and help.

Values come from flags, the environment (CACHD_NAME) or a YAML file.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from cachd import files
from cachd.errors import CachdError, Invalid, Unavailable
from cachd.fields import Bytes, Endpoint, Rate, Seconds
from cachd.findings import Finding, Place, key_of, sentence
from cachd.model import Limits, ModelSpec, Percentage
from cachd.model.listener import Listener
from cachd.policy.eviction import OPENED_SECONDS
from cachd.settings import file as configfile
from cachd.settings import given as settings
from cachd.settings.file import ConfigFile
from cachd.settings.given import Also, Giver, Setting
from cachd.settings.types import (
    Exemptions,
    Listens,
    Percent,
    ProxyUrl,
    Rates,
    Reachable,
    Refusals,
    Several,
    SizeOrPercent,
    SizeOrPercentOrAuto,
    Strings,
    Word,
)
from cachd.sources.entries import MOST_ENTRIES, Entry, doubled
from cachd.sources.trust import Authorities

_MOST_FINDINGS = 50


class Model(BaseModel):
    """One entry of `models`. The daemon pulls it at start, or when it appears in the file later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="what to pull, in any form that `cachd pull` takes")
    name: str | None = Field(None, description="local name; default: derived from the ref")
    required: bool = Field(False, description="/readyz?set=required fails until this model is ready")
    pin: bool = Field(
        False, description="pin the model: it is never evicted, and only a forced delete removes it"
    )
    warm: bool = Field(False, description="read the model into memory once it is ready")
    include: Strings = Field((), description="patterns of the files to pull; default: all files")
    exclude: Strings = Field((), description="patterns of the files to leave out")
    hub_id: str | None = Field(
        None, description="the Hub repository org/model under which a mirror of it appears in the Hub view"
    )
    priority: int = Field(
        0, ge=-100, le=100, description="models with a higher priority are pulled first and evicted last"
    )

    @model_validator(mode="after")
    def _is_spec(self) -> Self:
        try:
            _ = self.spec
        except CachdError as error:
            raise ValueError(str(error)) from error
        return self

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model spec that this entry asks for."""
        return ModelSpec.asked(self.ref, self.name or None, self.include, self.exclude, hub_id=self.hub_id)


class Config(BaseModel):
    """The daemon's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(
        Path("/var/lib/cachd"), description="the cache directory; everything in it must be on one file system"
    )
    own_directory: bool = Field(
        False,
        description="use the subdirectory root/cachd, and create it if it is missing: for a volume that"
        " others may write to, such as an emptyDir or a volume with an fsGroup",
    )
    disk_at_least: Bytes = Field(
        0,
        description="refuse to start if the file system of root is smaller than this, such as 1TB; catches a"
        " disk that is not mounted",
    )
    listen: Listens = Field(
        ("127.0.0.1:8470",),
        description="addresses of the API, one or several: HOST:PORT or unix:/PATH; see Listeners",
    )
    tls_cert_file: Path | None = Field(
        None,
        description="PEM file of the API's certificate and its chain: the API speaks TLS at every HOST:PORT"
        " not marked plain; reloaded when it changes",
    )
    tls_key_file: Path | None = Field(
        None,
        description="PEM file of the certificate's private key; default: tls_cert_file; reloaded when it"
        " changes",
    )
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM file of certificate authorities: clients must present a certificate that one of them"
        " issued; reloaded when it changes",
    )
    config: Path | None = Field(None, description="YAML file that sets these options")
    models: Annotated[tuple[Model, ...], Several] = Field(
        (), description="models to pull at start; reloaded when the file changes"
    )
    token_file: Path | None = Field(
        None,
        description="bearer tokens of the API: a file with one admin token, a file with a list of tokens, or"
        " a directory with one file for each token, such as a mounted Secret; re-read at every use",
    )
    anonymous_reads: bool = Field(
        True, description="answer reads without a token; the probes (/livez, /readyz, …/ready) never need one"
    )
    anonymous_writes: bool = Field(
        False,
        description="without token_file: start even on addresses other than loopback, where anybody on the"
        " network can write",
    )
    allowed_hosts: Strings = Field(
        (),
        description="host names to accept in the Host header; IP addresses and localhost are always accepted",
    )
    allow: Reachable = Field(
        (),
        description="what sources may reach besides public https: private networks (10.0.0.0/8) and URL"
        " prefixes (http://host:port/path/, file:///share/); reloaded when the file changes",
    )
    trust_claimed_digests: bool = Field(
        False,
        description="let a source share a cached file by stating its sha256 alone, without a proof that it"
        " has the bytes",
    )
    refuse: Refusals = Field(
        (),
        description="file patterns, such as *.bin: a pull that selects a matching file is refused; and"
        " digests (sha256:…): every model that contains one is withdrawn; reloaded when the file changes",
    )
    sources: Annotated[tuple[Entry, ...], Several] = Field(
        (),
        max_length=MOST_ENTRIES,
        description="settings for all refs that begin with a prefix, such as hf://org/; see Sources; reloaded"
        " when the file changes",
    )
    streams: int = Field(
        32,
        ge=1,
        le=256,
        description="most connections that receive at once, for all pulls together; adaptive: cachd adds"
        " connections only while throughput grows",
    )
    pulls: int = Field(4, ge=1, le=256, description="most models to pull at once; further pulls wait")
    queued_pulls: int = Field(
        10_000,
        ge=0,
        le=1_000_000,
        description="most pulls that may wait; a request beyond that is answered 503",
    )
    limit_bytes_per_second: Rate = Field(
        0,
        description="most bytes a second to receive from all sources together, such as 500MB; 0: no limit;"
        " reloaded when the file changes",
    )
    source_limits: Rates = Field(
        {},
        description="most bytes a second to receive from single sources, such as hf: 200MB; reloaded when the"
        " file changes",
    )
    retries: int = Field(
        8,
        ge=0,
        le=100,
        description="how often to request a part of a file again while it makes no progress; after that the"
        " pull fails",
    )
    stall_seconds: Seconds = Field(
        30.0, gt=0, le=3600, description="close a connection that delivers no byte for this long"
    )
    resolve_seconds: Seconds = Field(
        1800.0,
        gt=0,
        le=86400,
        description="fail a pull whose source takes longer than this to list the model's files, or answers"
        " fewer than 30 requests in a minute",
    )
    connect_seconds: Seconds = Field(
        10.0, gt=0, le=600, description="timeout for opening a connection to a source"
    )
    limit_bytes: SizeOrPercent | None = Field(
        None,
        description="most disk space for models, such as 500GB or 60% of the disk; default: all but"
        " reserve_free; reloaded when the file changes",
    )
    reserve_free: SizeOrPercentOrAuto = Field(
        "auto",
        description="disk space to keep free, such as 50GB or 10%; auto: 5% more than the kubelet's threshold"
        " (20% with its defaults) on a disk that the node shares, 0 on a disk of its own; reloaded when the"
        " file changes",
    )
    reserve_inodes: SizeOrPercentOrAuto = Field(
        "auto",
        description="inodes to keep free, such as 10%; auto: like reserve_free (10% with the kubelet's"
        " defaults); reloaded when the file changes",
    )
    kubelet_config: Path = Field(
        Path("/var/lib/kubelet/config.yaml"),
        description="the kubelet's configuration file, from which auto takes its thresholds; where it cannot"
        " be read, the kubelet's defaults apply",
    )
    evict: bool = Field(
        True,
        description="evict the models with the lowest score when a pull needs their space; false: evict only"
        " on request, and refuse a pull that does not fit",
    )
    evict_unused_seconds: Seconds = Field(
        0, ge=0, description="evict a model that nobody used for this long, even if there is space; 0: never"
    )
    keep_opened_seconds: Seconds = Field(
        OPENED_SECONDS,
        ge=0,
        description="do not evict a model that a process opened within this time; 0: only files that are open"
        " now count",
    )
    high_watermark: Percent = Field(
        Percentage(100),
        description="start to evict when more than this percentage of limit_bytes, or of the disk less"
        " reserve_free, is in use, even if no pull needs space",
    )
    low_watermark: Percent = Field(
        Percentage(98),
        validate_default=True,
        description="evict until no more than this percentage is in use",
    )
    keep_previous: int = Field(
        1, ge=0, le=100, description="how many earlier snapshots of each name to keep for cachd rollback"
    )
    scrub_bytes_per_second: Rate = Field(
        20_000_000,
        description="most bytes a second to re-read when verifying published models in the background, at"
        " idle I/O priority; 0: do not scrub",
    )
    scrub_interval_seconds: Seconds = Field(
        604800.0, gt=0, description="re-read and verify every published blob once in this time"
    )
    sweep_interval_seconds: Seconds = Field(
        3600.0,
        ge=0,
        description="remove leftovers that no model and no pull needs once in this time; 0: only on request",
    )
    keep_unfinished_seconds: Seconds = Field(
        86400.0,
        ge=0,
        description="keep partial downloads of ended pulls for this long, so that the next pull resumes them",
    )
    ca_file: Annotated[Path | None, Also(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))] = Field(
        None,
        description="PEM file of the certificate authorities to trust for sources; default: the system's",
    )
    s3_ca_file: Annotated[Path | None, Also(("AWS_CA_BUNDLE",))] = Field(
        None, description="PEM file of the certificate authorities to trust for S3; default: ca_file"
    )
    proxy: ProxyUrl | None = Field(
        None,
        description="reach all sources through this HTTP proxy (CONNECT), such as http://proxy:3128; env:"
        " take HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY from the environment",
    )
    no_proxy: Exemptions = Field(
        (),
        description="hosts to reach without the proxy: host, .domain, host:port, 10.0.0.0/8 or *; localhost"
        " and loopback addresses are never proxied",
    )
    proxy_credentials_file: Path | None = Field(
        None, description="file with user:password for the proxy, on one line; re-read at every use"
    )
    hf_endpoint: Annotated[Endpoint, Also(("HF_ENDPOINT",))] = Field(
        "https://huggingface.co", description="URL of the Hub or of a mirror; cachd sends the Hub token there"
    )
    hf_token_file: Path | None = Field(
        None,
        description="file with the Hub token; default: HF_TOKEN, the file that HF_TOKEN_PATH names, or the"
        " token of `hf auth login`",
    )
    s3_endpoint_url: Annotated[
        Endpoint | None,
        Also(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), unless="AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
    ] = Field(None, description="URL of an S3 server other than AWS")
    s3_region: Annotated[str | None, Also(("AWS_REGION", "AWS_DEFAULT_REGION"))] = Field(
        None,
        description="AWS region that requests are signed for; default: that of the AWS client's own"
        " configuration",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Word({"warn": "warning"})] = Field(
        "info", description="lowest severity to log"
    )
    log_format: Annotated[Literal["auto", "json", "text"], Word()] = Field(
        "auto", description="auto: text on a terminal, JSON elsewhere"
    )

    @field_validator("low_watermark")
    @classmethod
    def _below(cls, low: Percentage, info: ValidationInfo) -> Percentage:
        high = info.data.get("high_watermark", low)
        if low.percent > high.percent:
            raise ValueError(f"{low} is above high_watermark, {high}")
        return low

    @field_validator("tls_key_file", "tls_client_ca_file")
    @classmethod
    def _certified(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file and not info.data.get("tls_cert_file"):
            raise ValueError("needs tls_cert_file, too")
        return file

    @property
    def listeners(self) -> list[Listener]:
        return [Listener.parse(each) for each in self.listen]

    @property
    def limits(self) -> Limits:
        return Limits.of(self.limit_bytes_per_second, self.source_limits.items())


_ENTRIES: Mapping[str, type[BaseModel]] = {"models": Model, "sources": Entry}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The options in force, the setting of each option that was set, and the file as it was read.

    `flags` are the flags of the command line. `again` reads them once more.
    """

    config: Config
    settings: Mapping[str, Setting]
    flags: Mapping[str, object]
    content: bytes
    file: ConfigFile | None = None

    def place(self, *loc: str | int) -> str:
        """Where a value was set, as `FILE:LINE`, a variable or a flag; empty for a default.

        `loc` is the option's key, followed by keys and indexes inside its value.
        """
        return str(_place(loc, self.settings, self.file))

    def again(self) -> Loaded:
        """Read flags, environment and file again. Raises Invalid."""
        return read(**self.flags)

    def updated(self, now: Loaded, keys: Collection[str]) -> Loaded:
        """A copy of these options in which `keys` have their values of `now`."""
        config = self.config.model_copy(update={key: getattr(now.config, key) for key in keys})
        kept = {key: setting for key, setting in self.settings.items() if key not in keys}
        taken = {key: setting for key, setting in now.settings.items() if key in keys}
        return Loaded(config, kept | taken, self.flags, now.content, now.file)

    def differs_from(self, other: Loaded) -> list[str]:
        """The keys whose values differ between the two."""
        return [k for k in Config.model_fields if getattr(self.config, k) != getattr(other.config, k)]


def load(**flags: object) -> Config:
    """The options in force. A flag that is None counts as not given. Raises Invalid as `read` does."""
    return read(**flags).config


def read(**flags: object) -> Loaded:
    """The options in force, and where each was set. Raises Invalid with one line for each wrong option."""
    flags = {name: value for name, value in flags.items() if value is not None}
    named = flags.get("config") or settings.ours().get(settings.variable_of("config"))
    file = configfile.read(Path(str(named))) if named else None
    options = {name: field.metadata for name, field in Config.model_fields.items()}
    given = settings.given(options, flags, file)
    findings, more = list(file.findings) if file else [], 0
    try:
        config = Config.model_validate({name: setting.value for name, setting in given.items()})
        findings += _same_names(config.models, given, file) + _same_prefixes(config.sources, given, file)
        findings += _wrong_files(config, given)
        if not findings:
            return Loaded(config, given, flags, file.content if file else b"", file)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        findings += [_finding(dict(fault), given, file) for fault in faults[:_MOST_FINDINGS]]
        more = len(faults[_MOST_FINDINGS:])
    raise _refusal(findings, more)


def _refusal(findings: list[Finding], more: int) -> Invalid:
    lines = [str(finding) for finding in sorted(findings)[:_MOST_FINDINGS]]
    if more := more + len(findings[_MOST_FINDINGS:]):
        lines.append(f"and {more} more")
    return Invalid("\n".join(lines), code="bad_option", hint="cachd options lists every option")


def _finding(fault: Mapping[str, Any], given: Mapping[str, Setting], file: ConfigFile | None) -> Finding:
    """The finding for one error of pydantic's."""
    loc = fault["loc"]
    entry = _ENTRIES.get(str(loc[0])) if len(loc) > 2 else None
    fields = (entry or Config).model_fields
    field = fields.get(str(loc[2 if entry else 0]))
    reason = sentence(fault, fields, _wanted(field) if field else "")
    return Finding(_place(loc, given, file), key_of(loc), reason)


def _place(loc: tuple[str | int, ...], given: Mapping[str, Setting], file: ConfigFile | None) -> Place:
    setting = given.get(str(loc[0]))
    if setting and setting.giver is Giver.file and file:
        return file.place(loc)
    return setting.place if setting else Place("")


def _wanted(field: FieldInfo) -> str:
    """What the option takes, such as `a whole number from 1 to 256`; empty unless it is a bounded number."""
    least = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    most = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    is_range = field.annotation is int and None not in (least, most)
    return f"a whole number from {least} to {most}" if is_range else ""


def _same_names(
    models: Iterable[Model], given: Mapping[str, Setting], file: ConfigFile | None
) -> list[Finding]:
    """A finding for each model whose name an earlier model has."""
    findings = []
    first: dict[str, int] = {}
    for number, name in enumerate(model.spec.name for model in models):
        if first.setdefault(name, number) != number:
            loc = ("models", number)
            reason = f"models[{first[name]}] has the name {name}, too: give each model a name of its own"
            findings.append(Finding(_place(loc, given, file), key_of(loc), reason))
    return findings


def _same_prefixes(
    entries: Iterable[Entry], given: Mapping[str, Setting], file: ConfigFile | None
) -> list[Finding]:
    """A finding for each entry whose prefix an earlier entry has."""
    findings = []
    for first, second in doubled(entries):
        loc = ("sources", second, "prefix")
        findings.append(
            Finding(_place(loc, given, file), key_of(loc), f"sources[{first}] has this prefix, too")
        )
    return findings


def _wrong_files(config: Config, given: Mapping[str, Setting]) -> list[Finding]:
    """A finding for each CA file that holds no certificates.

    A CA file that a variable of another tool names is usually the system's bundle. It is only searched for a
    certificate, because parsing a bundle takes 25 ms.
    """
    findings = []
    for key, path in (("ca_file", config.ca_file), ("s3_ca_file", config.s3_ca_file)):
        if path is None:
            continue
        authorities = Authorities(str(path))
        try:
            if given[key].giver is Giver.ecosystem:
                authorities.check()
            else:
                authorities.context()
        except Unavailable as error:
            cause = error.__cause__
            reason = files.reason(cause) if isinstance(cause, OSError) else error.detail
            findings.append(
                Finding(given[key].place, key, f"{path} cannot be used: {reason}: give a PEM file")
            )
    return findings


def _shown(default: object) -> str:
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, environment variable, default, help) of every option, for the documentation."""
    for name, field in Config.model_fields.items():
        default = "" if field.default in (None, (), {}) else _shown(field.default)
        others = [v for also in field.metadata if isinstance(also, Also) for v in also.variables]
        text = field.description or ""
        text += f"; if it is not set: {', else '.join(others)}" if others else ""
        yield name, settings.variable_of(name), {"True": "true", "False": "false"}.get(default, default), text
