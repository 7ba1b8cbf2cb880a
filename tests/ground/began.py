"""A plugin of pytest for mutate.py: writes which test began last into the file that BEGAN names."""

from __future__ import annotations

import os
from pathlib import Path


def pytest_runtest_logstart(nodeid: str) -> None:
    Path(os.environ["BEGAN"]).write_text(nodeid)
