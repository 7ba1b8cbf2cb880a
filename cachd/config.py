"""Every option once: name, type, default, help. From flags, the environment (CACHD_NAME) or a YAML file."""

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
    """One entry of `models`: pulled at start, and when it appears in the file later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="what to pull, typed as for cachd pull")
    name: str | None = Field(None, description="its local name; default: from the ref")
    required: bool = Field(False, description="/readyz?set=required waits for it")
    pin: bool = Field(False, description="keep it: refuse to delete it")
    warm: bool = Field(False, description="bring it into memory when it is ready")
    include: Strings = Field((), description="patterns of files to take; none: all")
    exclude: Strings = Field((), description="patterns of files to leave out")
    hub_id: str | None = Field(None, description="org/model that a mirror stands for in the Hub view")
    priority: int = Field(0, ge=-100, le=100, description="higher goes first")

    @model_validator(mode="after")
    def _is_spec(self) -> Self:
        try:
            _ = self.spec
        except CachdError as error:
            raise ValueError(str(error)) from error
        return self

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """What it asks for."""
        return ModelSpec.asked(self.ref, self.name or None, self.include, self.exclude, hub_id=self.hub_id)


class Config(BaseModel):
    """The daemon's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path = Field(Path("/var/lib/cachd"), description="the cache's directory; one file system")
    own_directory: bool = Field(
        False,
        description="work in root/cachd, made if it is not there: for a volume that is open to others, as an"
        " emptyDir or one with an fsGroup is",
    )
    disk_at_least: Bytes = Field(
        0, description="refuse a smaller file system, such as 1TB: the disk of the root is not mounted"
    )
    listen: Listens = Field(
        ("127.0.0.1:8470",),
        description="where the API answers: HOST:PORT or unix:/PATH, one or several; see Listeners",
    )
    tls_cert_file: Path | None = Field(
        None, description="PEM certificate, with its chain: TLS at every HOST:PORT not marked plain; re-read"
    )
    tls_key_file: Path | None = Field(None, description="its key; default: in tls_cert_file; re-read with it")
    tls_client_ca_file: Path | None = Field(
        None, description="authorities of clients: whoever has no certificate of theirs is refused; re-read"
    )
    config: Path | None = Field(None, description="the YAML file these keys may stand in")
    models: Annotated[tuple[Model, ...], Several] = Field(
        (), description="models to pull at start; re-read when the file changes"
    )
    token_file: Path | None = Field(
        None,
        description="bearer tokens of the API: a file with one admin's token or a list, or a directory with a"
        " file each, such as a mounted Secret; re-read at every use",
    )
    anonymous_reads: bool = Field(
        True, description="false: reads need a token, too; probes (/livez, /readyz, …/ready) never do"
    )
    anonymous_writes: bool = Field(False, description="accept writes without a token even beyond loopback")
    allowed_hosts: Strings = Field(
        (), description="host names accepted in the Host header; addresses and localhost always are"
    )
    allow: Reachable = Field(
        (),
        description="private networks (10.0.0.0/8), plain-http or file:// prefixes that sources may reach;"
        " re-read with the file",
    )
    trust_claimed_digests: bool = Field(
        False, description="let a source share a file that is here by listing its sha256, with no proof"
    )
    refuse: Refusals = Field(
        (),
        description="patterns of files, such as *.bin, *.pt: a pull that would take one is refused; and"
        " digests, sha256:…, that are withdrawn wherever they are; re-read with the file",
    )
    sources: Annotated[tuple[Entry, ...], Several] = Field(
        (),
        max_length=MOST_ENTRIES,
        description="what belongs to a prefix, such as hf://org/; re-read with the file",
    )
    streams: int = Field(
        32,
        ge=1,
        le=256,
        description="the most connections that receive at once, for all pulls; as many are used as pay",
    )
    pulls: int = Field(4, ge=1, le=256, description="models pulled at once; the others wait")
    queued_pulls: int = Field(
        10_000, ge=0, le=1_000_000, description="pulls that may wait; beyond, asking is answered 503"
    )
    limit_bytes_per_second: Rate = Field(
        0, description="most to receive from all sources, such as 500MB; 0: no limit; re-read with the file"
    )
    source_limits: Rates = Field(
        {}, description="the same of single sources, such as hf: 200MB; re-read with the file"
    )
    retries: int = Field(8, ge=0, le=100, description="tries of a part that makes no progress")
    stall_seconds: Seconds = Field(
        30.0, gt=0, le=3600, description="a connection without a byte for so long is dropped"
    )
    resolve_seconds: Seconds = Field(
        1800.0,
        gt=0,
        le=86400,
        description="a source that has not listed a model's files for so long is given up; sooner, when it"
        " answers fewer than 30 requests in a minute",
    )
    connect_seconds: Seconds = Field(10.0, gt=0, le=600, description="patience with a new connection")
    limit_bytes: SizeOrPercent | None = Field(
        None,
        description="the most that models may take, such as 500GB or 60% of the disk; re-read with the file",
    )
    reserve_free: SizeOrPercentOrAuto = Field(
        "auto",
        description="what stays free of the disk, such as 50GB or 10%; auto: 5% more than the kubelet wants"
        " (20%) where the node shares the disk, nothing on a disk of its own; re-read with the file",
    )
    reserve_inodes: SizeOrPercentOrAuto = Field(
        "auto", description="the same of inodes (auto: 10%); re-read with the file"
    )
    kubelet_config: Path = Field(
        Path("/var/lib/kubelet/config.yaml"),
        description="where auto finds the kubelet's thresholds; its defaults where that cannot be read",
    )
    evict: bool = Field(
        True,
        description="evict what is worth least to make room; false: only when asked, and refuse pulls",
    )
    evict_unused_seconds: Seconds = Field(
        0, ge=0, description="evict what nobody used for so long, room or not; 0: keep it"
    )
    keep_opened_seconds: Seconds = Field(
        OPENED_SECONDS,
        ge=0,
        description="evict nothing that a process opened so lately; 0: only what is open",
    )
    high_watermark: Percent = Field(
        Percentage(100),
        description="evict without a pull once models and others take more of the room than this",
    )
    low_watermark: Percent = Field(Percentage(98), validate_default=True, description="and down to this")
    keep_previous: int = Field(
        1, ge=0, le=100, description="snapshots that a name led to before, kept for a way back"
    )
    scrub_bytes_per_second: Rate = Field(
        20_000_000, description="most to read again of published models, when the disk is idle; 0: off"
    )
    scrub_interval_seconds: Seconds = Field(
        604800.0, gt=0, description="in so long, every published blob is read again once"
    )
    sweep_interval_seconds: Seconds = Field(
        3600.0, ge=0, description="from one removal of what nothing needs to the next; 0: only when asked"
    )
    keep_unfinished_seconds: Seconds = Field(
        86400.0, ge=0, description="so long what a pull that ended left behind is kept for the next one"
    )
    ca_file: Annotated[Path | None, Also(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))] = Field(
        None, description="PEM file of the authorities to trust; default: the system's"
    )
    s3_ca_file: Annotated[Path | None, Also(("AWS_CA_BUNDLE",))] = Field(
        None, description="the same for S3 alone; default: ca_file"
    )
    proxy: ProxyUrl | None = Field(
        None,
        description="ask all origins through this proxy, by CONNECT, such as http://proxy:3128; env: through"
        " the environment's HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, less its NO_PROXY",
    )
    no_proxy: Exemptions = Field(
        (),
        description="origins asked without the proxy: host, .domain, host:port, 10.0.0.0/8, *;"
        " localhost and loopback addresses always are",
    )
    proxy_credentials_file: Path | None = Field(
        None, description="user:password for the proxy, on one line; re-read at every use"
    )
    hf_endpoint: Annotated[Endpoint, Also(("HF_ENDPOINT",))] = Field(
        "https://huggingface.co", description="the Hub, or a mirror of it; it gets the Hub token"
    )
    hf_token_file: Path | None = Field(
        None,
        description="the Hub token; default: HF_TOKEN, the file HF_TOKEN_PATH names, that of `hf auth login`",
    )
    s3_endpoint_url: Annotated[
        Endpoint | None,
        Also(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), unless="AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
    ] = Field(None, description="an S3 server other than AWS")
    s3_region: Annotated[str | None, Also(("AWS_REGION", "AWS_DEFAULT_REGION"))] = Field(
        None, description="region to sign for; default: the AWS client's own"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Word({"warn": "warning"})] = Field(
        "info", description="least severity that is logged"
    )
    log_format: Annotated[Literal["auto", "json", "text"], Word()] = Field(
        "auto", description="auto: text on a terminal, json elsewhere"
    )

    @field_validator("low_watermark")
    @classmethod
    def _below(cls, low: Percentage, told: ValidationInfo) -> Percentage:
        high = told.data.get("high_watermark", low)
        if low.percent > high.percent:
            raise ValueError(f"{low} is above high_watermark, {high}")
        return low

    @field_validator("tls_key_file", "tls_client_ca_file")
    @classmethod
    def _certified(cls, file: Path | None, told: ValidationInfo) -> Path | None:
        if file and not told.data.get("tls_cert_file"):
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
    """The options in force, who gave each that was given, and the content of the file they were read from."""

    config: Config
    settings: Mapping[str, Setting]
    flags: Mapping[str, object]
    content: bytes
    file: ConfigFile | None = None

    def place(self, *loc: str | int) -> str:
        """Where a part of an option's value stands; empty when nobody gave it."""
        return str(_place(loc, self.settings, self.file))

    def again(self) -> Loaded:
        """The options as the environment and the file have them now. Raises Invalid."""
        return read(**self.flags)

    def updated(self, now: Loaded, keys: Collection[str]) -> Loaded:
        """These options, but for `keys` as they are `now`."""
        config = self.config.model_copy(update={key: getattr(now.config, key) for key in keys})
        kept = {key: setting for key, setting in self.settings.items() if key not in keys}
        taken = {key: setting for key, setting in now.settings.items() if key in keys}
        return Loaded(config, kept | taken, self.flags, now.content, now.file)

    def differs_from(self, other: Loaded) -> list[str]:
        """The keys whose values are others there."""
        return [k for k in Config.model_fields if getattr(self.config, k) != getattr(other.config, k)]


def load(**flags: object) -> Config:
    """The options in force, flags that are None left out. Raises Invalid, naming each wrong one."""
    return read(**flags).config


def read(**flags: object) -> Loaded:
    """The options in force, and where they come from. Raises Invalid, with a line for each wrong one."""
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
    """One error that pydantic found, in our own words."""
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
    """`a whole number from 1 to 256`, of an option that is one."""
    least = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    most = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    is_range = field.annotation is int and None not in (least, most)
    return f"a whole number from {least} to {most}" if is_range else ""


def _same_names(
    models: Iterable[Model], given: Mapping[str, Setting], file: ConfigFile | None
) -> list[Finding]:
    """Names that two models have."""
    findings = []
    first: dict[str, int] = {}
    for number, name in enumerate(model.spec.name for model in models):
        if first.setdefault(name, number) != number:
            loc = ("models", number)
            reason = f"models[{first[name]}] is named {name}, too: give each a name of its own"
            findings.append(Finding(_place(loc, given, file), key_of(loc), reason))
    return findings


def _same_prefixes(
    entries: Iterable[Entry], given: Mapping[str, Setting], file: ConfigFile | None
) -> list[Finding]:
    """Prefixes that two entries have."""
    findings = []
    for first, second in doubled(entries):
        loc = ("sources", second, "prefix")
        findings.append(Finding(_place(loc, given, file), key_of(loc), f"stands in sources[{first}], too"))
    return findings


def _wrong_files(config: Config, given: Mapping[str, Setting]) -> list[Finding]:
    """Files of authorities that hold none."""
    findings = []
    for key, path in (("ca_file", config.ca_file), ("s3_ca_file", config.s3_ca_file)):
        if path is None:
            continue
        authorities = Authorities(str(path))
        try:
            if given[key].giver is Giver.ecosystem:  # the system's own bundle as a rule: parsed when needed
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
    """(key, environment variable, default, help) of every option, for the documentation."""
    for name, field in Config.model_fields.items():
        default = "" if field.default in (None, (), {}) else _shown(field.default)
        others = [v for also in field.metadata if isinstance(also, Also) for v in also.variables]
        text = field.description or ""
        text += f"; where it is not set: {', else '.join(others)}" if others else ""
        yield name, settings.variable_of(name), {"True": "true", "False": "false"}.get(default, default), text
