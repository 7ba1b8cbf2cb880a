"""The OpenSSL of cachd's image (3.5), for a Python that stands on an older one.

Since 3.1 it deciphers AES-GCM with AVX-512, where the processor has that. No package is that library alone:
it is taken out of one that brings it along. A Python with an OpenSSL built into it cannot be given another.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CARRIER = "psycopg-binary"
HERE = ssl.OPENSSL_VERSION


def given(place: Path) -> Mapping[str, str]:
    """The environment in which a Python uses it, by links in `place`; empty if none is installed."""
    try:
        files = importlib.metadata.files(CARRIER) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for file in files:
        if file.parent.name == "psycopg_binary.libs":
            (place / file.name).symlink_to(file.locate())
            if named := re.match(r"(libssl|libcrypto)-\w+(\.so\.3)$", file.name):
                (place / "".join(named.groups())).symlink_to(file.locate())
    return {"LD_LIBRARY_PATH": str(place)}


def version(env: Mapping[str, str]) -> str:
    """What a Python in this environment stands on."""
    line = (sys.executable, "-c", "import ssl; print(ssl.OPENSSL_VERSION)")
    told = subprocess.run(line, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return told.stdout.strip()
