"""Options of the cache directory."""

from pathlib import Path

from pydantic import Field

from cachd.config.group import Group
from cachd.fields import AbsolutePath, Bytes


class RootOptions(Group):
    """Where the cache rests on the disk."""

    root: AbsolutePath = Field(
        Path("/var/lib/cachd"), description="the cache directory; everything in it must be on one file system"
    )
    own_directory: bool = Field(
        default=False,
        description="use the subdirectory root/cachd, and create it if it is missing: for a volume that"
        " others may write to, such as an emptyDir or a volume with an fsGroup",
    )
    shared: bool | None = Field(
        None,
        description="other nodes use this root, too, because it is on a shared volume (RWX): nothing is"
        " evicted or deleted there without force, and each `pull --direct` waits for its turn; default: true"
        " on a network file system and, for `pull --direct`, on FUSE and 9P",
    )
    disk_at_least: Bytes = Field(
        0,
        description="refuse to start if the file system of root is smaller than this, such as 1TB; catches a"
        " disk that is not mounted",
    )
