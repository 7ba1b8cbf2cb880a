"""Tells the files of a model from what systems and tools leave beside them, by their paths.

Left out is what no engine reads, and what harms those that take all files with a suffix (`._a.safetensors`).
A file that only a download leaves before it has ended shows that the files beside it may not be complete.
"""

from __future__ import annotations

import re
from pathlib import Path

from cachd.errors import Invalid

_NAMES = (
    # git; what ModelScope writes down
    r"\.git|\.msc|\.mdl|\.mv",
    # fsck; snapshots that NetApp, ZFS, btrfs and NAS devices show in directories; GlusterFS, Lustre
    r"lost\+found|\.snapshots?|~snapshot|\.zfs|#snapshot|@Recently-Snapshot|\.glusterfs|\.lustre",
    # files that an NFS, FUSE or SMB client deleted and still reads
    r"\.nfs[0-9a-f]{16,}|\.fuse_hidden[0-9a-f]+|\.smbdelete[0-9A-Za-z]+",
    # macOS: the second fork of a file, where the file system has none, and the directories of a volume
    r"\._[^/]*|\.DS_Store|__MACOSX|\.Spotlight-V100|\.Trashes|\.fseventsd|\.TemporaryItems|\.apdisk",
    # Windows, NAS devices and desktops
    r"Thumbs\.db|ehthumbs\.db|[Dd]esktop\.ini|\$RECYCLE\.BIN|System Volume Information",
    r"@eaDir|@Recycle|#recycle|\.@__thumb|\.Trash-\d+|\.stfolder|\.stversions",
)
_LEFT_OUT = re.compile("|".join(_NAMES), re.DOTALL)
_OF_HF_DOWNLOAD = "/.cache/huggingface/"
# aria2, lftp and axel write into the file itself, and what is left to do into such a file beside it.
_CONTROL = (".aria2", ".lftp-pget-status", ".st")
_WEIGHTS = r"[^/]+\.(?:safetensors|gguf|bin|pt|pth|onnx|json)"
_UNFINISHED = re.compile(
    r"[^/]+\.(?:aria2|part|partial|incomplete|crdownload|opdownload|download|downloading|filepart|icloud|!ut|!qB)"
    r"|[^/]+\.(?:lftp-pget-status|s3fetch_tmp|part\.minio)"
    r"|[^/]+_\.gstmp|\.~tmp~|\._____temp|\.rsync-partial"
    rf"|\.{_WEIGHTS}\.[A-Za-z0-9]{{6}}"  # rsync
    rf"|{_WEIGHTS}\.(?:(?=\d*[A-Fa-f])[0-9A-Fa-f]{{8}}|st|tmp|temp)"  # s3transfer; axel; scripts
    r"|\.azDownload-[0-9a-f-]{36}-[^/]+|(?:\.syncthing\.|~syncthing~)[^/]+\.tmp"
    r"|sha256-[0-9a-f]{64}-partial(?:-\d+)?",  # Ollama
    re.DOTALL,
)


def is_left_out(path: str) -> bool:
    """Whether a path, or a directory above it, is never part of a model."""
    return _OF_HF_DOWNLOAD in f"/{path}/" or any(map(_LEFT_OUT.fullmatch, path.split("/")))


def unfinished(path: str) -> str | None:
    """The path that a download or a copy has not ended, if `path` is what it leaves until then; or None."""
    if not any(_UNFINISHED.fullmatch(part) for part in path.split("/")):
        return None
    control = next((suffix for suffix in _CONTROL if path.endswith(suffix)), "")
    return path.removesuffix(control)


def control_files(path: Path) -> list[Path]:
    """The files that downloaders keep beside a file until its download has ended."""
    return [path.with_name(path.name + suffix) for suffix in _CONTROL if unfinished(path.name + suffix)]


def still_begun(shown: Path | str) -> Invalid:
    """The error for what a download or a copy leaves until it has ended."""
    return Invalid(
        f"{str(shown)!r:.300} is what a download or a copy leaves until it has ended",
        code="incomplete_model",
        hint="let it end and start it again if it has broken off; or remove it, or exclude it by a pattern",
    )
