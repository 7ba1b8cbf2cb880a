"""Recognises, by their paths, files beside a model that are not part of it: those of systems and tools.

They are left out, because no engine reads them. Some would even make an engine fail that loads all files with
a suffix (`._a.safetensors`). Files of an unfinished download or copy are not left out: they show that the
model may be incomplete.
"""

from __future__ import annotations

import re
from pathlib import Path

from cachd.errors import Invalid

_NAMES = (
    # git; metadata of ModelScope
    r"\.git|\.msc|\.mdl|\.mv",
    # fsck; snapshots that NetApp, ZFS, btrfs and NAS devices show in directories; GlusterFS, Lustre
    r"lost\+found|\.snapshots?|~snapshot|\.zfs|#snapshot|@Recently-Snapshot|\.glusterfs|\.lustre",
    # files that an NFS, FUSE or SMB client deleted and still reads
    r"\.nfs[0-9a-f]{16,}|\.fuse_hidden[0-9a-f]+|\.smbdelete[0-9A-Za-z]+",
    # macOS: resource forks on file systems without them, and directories at the top of a volume
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
    """The path of the incomplete file, if `path` belongs to an unfinished download or copy; else None.

    aria2, lftp and axel write into the file itself and keep their state in `FILE.aria2` or the like, so the
    path is then `FILE`.
    """
    if not any(_UNFINISHED.fullmatch(part) for part in path.split("/")):
        return None
    control = next((suffix for suffix in _CONTROL if path.endswith(suffix)), "")
    return path.removesuffix(control)


def control_files(path: Path) -> list[Path]:
    """The files that downloaders keep beside a file until its download has ended."""
    return [path.with_name(path.name + suffix) for suffix in _CONTROL if unfinished(path.name + suffix)]


def not_ended(shown: Path | str) -> Invalid:
    """The error for a file of an unfinished download or copy."""
    return Invalid(
        f"{str(shown)!r:.300} belongs to a download or a copy that has not ended",
        code="incomplete_model",
        hint="wait until it has ended, or start it again if it broke off; remove a leftover, or exclude it by"
        " a pattern",
    )
