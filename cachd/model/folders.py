"""Finds the objects in a listing of keys that stand for folders and are no files.

A flat listing of keys has no folders, so consoles, Hadoop, rclone and mounts store empty objects for them:

    llama/              consoles, rclone, s3fs, goofys and other mounts
    llama               older s3fs, Azure's tools and gateways; beside it there is llama/config.json
    llama_$folder$      Hadoop

An empty object of any other name, such as `.keep`, is a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cachd.errors import Invalid

_OF_HADOOP = "_$folder$"


def folder_markers(sizes: Mapping[str, int]) -> frozenset[str]:
    """The names that stand for folders. `sizes`: the bytes of each listed object, by name."""
    folders = {folder for name in sizes for folder in _folders(name)}
    folders |= {name.removesuffix(_OF_HADOOP) for name in sizes if _is_always_one(name, sizes[name])}
    return frozenset(
        name
        for name, size in sizes.items()
        if not size and (name in folders or name.endswith("/") or _is_always_one(name, size))
    )


def check_folders(shown: str, sizes: Mapping[str, int]) -> None:
    """Raises Invalid when a file is also a folder of another file, or has the name of a folder.

    `sizes`: the bytes of each file, by name. `shown`: how the error names the listing.
    """
    for name in sorted(sizes):
        if name.endswith("/"):
            raise Invalid(
                f"{shown} lists {name!r:.200}, the name of a folder, with {sizes[name]} bytes",
                code="bad_manifest",
                hint="no file can have that name: rename the object, or delete it",
            )
        clash = next((folder for folder in _folders(name) if folder in sizes), None)
        if clash is not None:
            raise Invalid(
                f"{shown} lists {clash!r:.200} as a file of {sizes[clash]} bytes and as the folder of"
                f" {name!r:.200}",
                code="bad_manifest",
                hint="no directory can hold both: rename one of them, or pull one with a longer ref",
            )


def _folders(name: str) -> Iterator[str]:
    """Every folder that contains `name`; for `a/` that is `a` itself."""
    at = name.find("/")
    while at != -1:
        yield name[:at]
        at = name.find("/", at + 1)


def _is_always_one(name: str, size: int) -> bool:
    return not size and name.endswith(_OF_HADOOP)
