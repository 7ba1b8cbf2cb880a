"""Every option once: name, type, default, help. From flags, the environment (CACHD_NAME) or a YAML file."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cachd.errors import CachdError, Invalid
from cachd.model import Limits, Scheme, Share, Wish, bytes_of, rate_of, room_of
from cachd.policy.eviction import OPENED_SECONDS


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _list(value: object) -> object:
    """A list, JSON or not: an environment variable may also hold `a, b`."""
    if not isinstance(value, str):
        return value
    return _json(value) if value.lstrip().startswith("[") else [v.strip() for v in value.split(",")]


def _mapping(value: object) -> object:
    """A mapping, JSON or not: an environment variable may also hold `a=1, b=2`."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value)
    pairs = (pair.partition("=") for pair in value.split(","))
    return {key.strip(): told.strip() for key, _, told in pairs}


def _listen(value: str) -> str:
    found = re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", value)
    if not found or int(found[1]) > 65535:
        raise ValueError("write HOST:PORT, such as 127.0.0.1:8470 or [::]:8470")
    return value


def _room(value: object) -> int | Share:
    found = room_of(value)
    if isinstance(found, Share) or (type(found) is int and 0 <= found < 1 << 63):
        return found
    raise ValueError("write bytes, such as 500GB, or a share of the disk, such as 20%")


def _room_or_auto(value: object) -> int | Share | Literal["auto"]:
    return "auto" if value == "auto" else _room(value)


def _share(value: object) -> Share:
    found = room_of(value)
    if not isinstance(found, Share):
        raise ValueError("write a share, such as 95%")  # noqa: TRY004 what pydantic tells the user
    return found


Room = Annotated[int | Share, PlainValidator(_room)]
RoomOrAuto = Annotated[int | Share | Literal["auto"], PlainValidator(_room_or_auto)]
Percent = Annotated[Share, PlainValidator(_share)]
Bytes = Annotated[int, BeforeValidator(bytes_of), Field(ge=0, lt=1 << 63)]
Rate = Annotated[int, BeforeValidator(rate_of), Field(ge=0, lt=1 << 63)]
Rates = Annotated[dict[Scheme, Rate], NoDecode, BeforeValidator(_mapping)]
Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_list)]
Listen = Annotated[str, AfterValidator(_listen)]


class Model(BaseModel):
    """One entry of `models`: pulled at start, and when it appears in the file later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="what to pull")
    name: str | None = Field(None, description="its local name; default: from the ref")
    required: bool = Field(False, description="/readyz?set=required waits for it")
    pin: bool = Field(False, description="keep it: refuse to delete it")
    warm: bool = Field(False, description="bring it into memory when it is ready")
    include: tuple[str, ...] = Field((), description="patterns of files to take; none: all")
    exclude: tuple[str, ...] = Field((), description="patterns of files to leave out")
    priority: int = Field(0, ge=-100, le=100, description="higher goes first")

    @functools.cached_property
    def wish(self) -> Wish:
        """Raises Invalid."""
        return Wish.asked(self.ref, self.name or None, self.include, self.exclude)


_MODELS = TypeAdapter(tuple[Model, ...])


class Config(BaseSettings):
    """The daemon's options. A flag wins over the environment, that over the file, that over the default."""

    model_config = SettingsConfigDict(env_prefix="CACHD_", extra="forbid", frozen=True, env_ignore_empty=True)

    root: Path = Field(Path("/var/lib/cachd"), description="the cache's directory; one file system")
    disk_at_least: Bytes = Field(
        0, description="refuse a smaller file system, such as 1TB: the disk of the root is not mounted"
    )
    listen: Listen = Field("127.0.0.1:8470", description="address of the HTTP API, HOST:PORT")
    config: Path | None = Field(None, description="the YAML file these keys may stand in")
    models: tuple[Model, ...] = Field(
        (), description="models to pull at start; re-read when the file changes"
    )
    token_file: Path | None = Field(None, description="bearer token that writes need; re-read at every use")
    anonymous_writes: bool = Field(False, description="accept writes without a token even beyond loopback")
    allowed_hosts: Strings = Field(
        (), description="host names accepted in the Host header; addresses and localhost always are"
    )
    allow: Strings = Field(
        (),
        description="private networks (10.0.0.0/8), plain-http or file:// prefixes that sources may reach",
    )
    refuse: Strings = Field(
        (), description="patterns of files, such as *.bin, *.pt: a pull that would take one is refused"
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
    stall_seconds: float = Field(
        30.0, gt=0, le=3600, description="a connection without a byte for so long is dropped"
    )
    connect_seconds: float = Field(10.0, gt=0, le=600, description="patience with a new connection")
    limit_bytes: Room | None = Field(
        None,
        description="the most that models may take, such as 500GB or 60% of the disk; re-read with the file",
    )
    reserve_free: RoomOrAuto = Field(
        "auto",
        description="what stays free of the disk, such as 50GB or 10%; auto: 5% more than the kubelet wants"
        " (20%) where the node shares the disk, nothing on a disk of its own; re-read with the file",
    )
    reserve_inodes: RoomOrAuto = Field("auto", description="the same of inodes (auto: 10%)")
    kubelet_config: Path = Field(
        Path("/var/lib/kubelet/config.yaml"),
        description="where auto finds the kubelet's thresholds; its defaults where that cannot be read",
    )
    evict: bool = Field(
        True,
        description="evict what is worth least to make room; false: only when asked, and refuse pulls",
    )
    evict_unused_seconds: float = Field(
        0, ge=0, description="evict what nobody used for so long, room or not; 0: keep it"
    )
    keep_opened_seconds: float = Field(
        OPENED_SECONDS,
        ge=0,
        description="evict nothing that a process opened so lately; 0: only what is open",
    )
    high_watermark: Percent = Field(
        Share(100), description="evict without a pull once models and others take more of the room than this"
    )
    low_watermark: Percent = Field(Share(98), description="and down to this")
    keep_previous: int = Field(
        1, ge=0, le=100, description="snapshots that a name led to before, kept for a way back"
    )
    scrub_bytes_per_second: Rate = Field(
        20_000_000, description="most to read again of published models, when the disk is idle; 0: off"
    )
    scrub_interval_seconds: float = Field(
        604800.0, gt=0, description="in so long, every published blob is read again once"
    )
    sweep_interval_seconds: float = Field(
        3600.0, ge=0, description="from one removal of what nothing needs to the next; 0: only when asked"
    )
    keep_unfinished_seconds: float = Field(
        86400.0, ge=0, description="so long what a pull that ended left behind is kept for the next one"
    )
    ca_file: Path | None = Field(None, description="PEM of the authorities to trust; default: the system's")
    hf_endpoint: str = Field("https://huggingface.co", description="the Hub, or a mirror of it")
    hf_token_file: Path | None = Field(None, description="the Hub token; default: the environment's HF_TOKEN")
    s3_endpoint_url: str | None = Field(None, description="an S3 server other than AWS")
    s3_region: str | None = Field(None, description="region to sign for; default: the AWS client's own")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severity that is logged"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto: text on a terminal, json elsewhere"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low_watermark.percent > self.high_watermark.percent:
            raise ValueError("low_watermark is above high_watermark")
        return self

    @property
    def limits(self) -> Limits:
        return Limits.of(self.limit_bytes_per_second, self.source_limits.items())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 no .env file is read
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _File(settings_cls, init_settings, env_settings)


class _File(PydanticBaseSettingsSource):
    """The YAML file that the flag or the environment names."""

    def __init__(self, settings_cls: type[BaseSettings], *above: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._above = above

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = next((told for told in (source().get("config") for source in self._above) if told), None)
        return read_file(Path(path)) if path else {}


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises Invalid."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(
            f"configuration file {path} cannot be read: {error}", code="bad_config", mend="check the path"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a 13th month
        mark = getattr(error, "problem_mark", None)  # where, and not what: it may be a password
        where = f" at line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or type(error).__name__
        raise Invalid(f"configuration file {path} is not YAML{where}: {why}", code="bad_config") from error
    if not isinstance(found, dict | None) or not all(isinstance(key, str) for key in found or ()):
        raise Invalid(
            f"configuration file {path} holds no keys", code="bad_config", mend="write 'key: value' lines"
        )
    return {key: value for key, value in (found or {}).items() if value is not None}


def load(**flags: object) -> Config:
    """The options in force, flags that are None left out. Raises Invalid, naming each wrong one."""
    try:
        config = Config(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
        _check_names(config.models)
    except SettingsError as error:
        raise Invalid(
            f"options are wrong: {error}", code="bad_option", mend="lists in the environment are JSON"
        ) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise Invalid(
            f"options are wrong: {wrong}", code="bad_option", mend="cachd serve --help lists them"
        ) from error
    return config


def _check_names(models: Iterable[Model]) -> None:
    """Raises Invalid for a ref or name that is none, and for one name given to two models."""
    for name, count in Counter(model.wish.name for model in models).items():
        if count > 1:
            raise Invalid(
                f"models: {count} are named {name}", code="bad_option", mend="give each a name of its own"
            )


def load_models(path: Path) -> tuple[Model, ...]:
    """The `models` of the file as it is now. Raises Invalid."""
    try:
        listed = _MODELS.validate_python(read_file(path).get("models", ()))
        _check_names(listed)
    except (ValidationError, CachdError) as error:
        reason = error.detail if isinstance(error, CachdError) else str(error.errors()[0]["msg"])
        raise Invalid(f"models in {path}: {reason}", code="bad_config") from error
    return listed


KUBELET_DEFAULTS = {"nodefs.available": "10%", "imagefs.available": "15%", "nodefs.inodesFree": "5%"}
_KUBELET_IMAGE_GC = 85


def kubelet_keeps(path: Path, total_bytes: int) -> tuple[Share, Share]:
    """Below which share of free bytes, and of free inodes, the kubelet deletes images or evicts pods.

    From its configuration file (KubeletConfiguration: evictionHard, evictionSoft and
    imageGCHighThresholdPercent), its documented defaults for what that does not say or cannot be read.
    """
    try:
        told = read_file(path)
    except Invalid:
        told = {}
    signals = [told.get("evictionHard") or KUBELET_DEFAULTS, told.get("evictionSoft") or {}]
    kept = {"available": Share(0), "inodesFree": Share(0)}
    for name, value in ((n, v) for each in signals if isinstance(each, dict) for n, v in each.items()):
        _, _, what = str(name).partition(".")
        found = room_of(value)
        if what in kept and isinstance(found, Share | int):
            percent = found.percent if isinstance(found, Share) else 100 * found / total_bytes
            kept[what] = Share(min(max(kept[what].percent, percent), 100))
    images = told.get("imageGCHighThresholdPercent", _KUBELET_IMAGE_GC)
    if isinstance(images, int) and 0 <= images <= 100:
        kept["available"] = Share(max(kept["available"].percent, 100 - images))
    return kept["available"], kept["inodesFree"]


def table() -> Iterator[tuple[str, str, str, str]]:
    """(key, environment variable, default, help) of every option, for the documentation."""
    for name, field in Config.model_fields.items():
        default = (
            ""
            if field.default in (None, (), {})
            else str(field.default).replace("False", "false").replace("True", "true")
        )
        yield name, f"CACHD_{name.upper()}", default, field.description or ""
