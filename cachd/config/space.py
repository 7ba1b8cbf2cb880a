"""Options of disk space and eviction."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from cachd.config.group import RELOADED, Group
from cachd.fields import AbsolutePath, Seconds
from cachd.model import Percentage
from cachd.policy.eviction import OPENED_SECONDS
from cachd.settings.types import KubeletUrl, Percent, SizeOrPercent, SizeOrPercentOrAuto, Thresholds

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class SpaceOptions(Group):
    """How much space models may take, and which are evicted."""

    limit_bytes: Annotated[SizeOrPercent | None, RELOADED] = Field(
        None,
        description="most disk space for models, such as 500GB or 60% of the disk; default: all but"
        " reserve_free",
    )
    reserve_free: Annotated[SizeOrPercentOrAuto, RELOADED] = Field(
        "auto",
        description="disk space to keep free, such as 50GB or 10%; auto: 5% more than the kubelet's"
        " threshold (20% with its defaults) on a disk that the node shares, 0 on a disk of its own",
    )
    reserve_inodes: Annotated[SizeOrPercentOrAuto, RELOADED] = Field(
        "auto",
        description="inodes to keep free, such as 10%; auto: like reserve_free (10% with the kubelet's"
        " defaults)",
    )
    kubelet_config: AbsolutePath = Field(
        Path("/var/lib/kubelet/config.yaml"),
        description="the kubelet's configuration file, from which auto takes its thresholds; where it cannot"
        " be read, as in a pod, the kubelet's defaults apply",
    )
    kubelet_thresholds: Annotated[Thresholds, RELOADED] = Field(
        {},
        description="the kubelet's eviction thresholds, such as nodefs.available: 10%, in place of"
        " kubelet_config; imagefs.available also stands for 100 - imageGCHighThresholdPercent",
    )
    kubelet_url: KubeletUrl | None = Field(
        None,
        description="where to ask the kubelet for its thresholds, such as https://10.0.0.7:10250, at each"
        " start and reload; takes the permission to get nodes/configz (Kubernetes 1.33 and later)",
    )
    kubelet_token_file: AbsolutePath = Field(
        _SERVICE_ACCOUNT / "token", description="the token of a service account to show the kubelet"
    )
    kubelet_ca_file: AbsolutePath = Field(
        _SERVICE_ACCOUNT / "ca.crt",
        description="PEM file of the authority that signed the kubelet's serving certificate",
    )
    evict: bool = Field(
        default=True,
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

    @field_validator("low_watermark")
    @classmethod
    def _below(cls, low: Percentage, info: ValidationInfo) -> Percentage:
        high = info.data.get("high_watermark", low)
        if low.percent > high.percent:
            raise ValueError(f"{low} is above high_watermark, {high}")
        return low
