"""The store for hf_xet (tests/ground/xet.py): hf_xet downloads what it uploaded, complete or in part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.xet import SETTINGS, XetStore

MIB = 1 << 20
UPLOAD = """
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(
    endpoint=sys.argv[1], token="any", token_expiry_unix_secs=1 << 40
) as commit:
    for path in sys.argv[2:]:
        commit.start_upload_file(path)
"""
DOWNLOAD = """
import sys, hf_xet
group = hf_xet.XetSession().new_download_stream_group(
    endpoint=sys.argv[1], token="any", token_expiry_unix_secs=1 << 40
)
start, stop = map(int, sys.argv[4:])
stream = group.download_stream(hf_xet.XetFileInfo(sys.argv[2], int(sys.argv[3])), start, stop)
for content in stream:
    sys.stdout.buffer.write(content)
"""


def ran(script: str, *arguments: object, home: Path) -> bytes:
    """The output of a script that uses hf_xet."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = {**os.environ, **SETTINGS, "HF_HOME": str(home)}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, timeout=120).stdout


def test_hf_xet_downloads_what_it_uploaded_and_uploads_no_chunk_twice(origin: Origin, tmp_path: Path) -> None:
    first = noise(3 * MIB) + bytes(2 * MIB)
    second = first[: 2 * MIB] + noise(100_000, 2) + first[2 * MIB :]
    (tmp_path / "xorbs").mkdir()
    with XetStore(tmp_path / "xorbs", origin.url) as store:
        for content in (first, second):
            (tmp_path / "file").write_bytes(content)
            known = {*store.files}
            ran(UPLOAD, store.url, tmp_path / "file", home=tmp_path)
            (name,) = {*store.files} - known
            for xorb in (tmp_path / "xorbs").iterdir():
                origin.add(f"/{xorb.name}", xorb)
            for start, stop in ((0, len(content)), (MIB + 7, 4 * MIB + 1)):
                got = ran(DOWNLOAD, store.url, name, len(content), start, stop, home=tmp_path)
                assert got == content[start:stop]
    stored = sum(xorb.stat().st_size for xorb in (tmp_path / "xorbs").iterdir())
    assert stored < 4 * MIB, "the zeros are compressed, and of the second file only what is new is there"
