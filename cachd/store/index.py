"""Groups what the store knows of one root: where each name leads, and which files and blobs are there."""

from __future__ import annotations

from dataclasses import dataclass

from cachd.store.content import ContentStore
from cachd.store.copies import Copies
from cachd.store.history import Histories
from cachd.store.layout import Layout
from cachd.store.manifests import Manifests
from cachd.store.names import Names


@dataclass(frozen=True, slots=True)
class Index:
    """What every change of a name reads and updates. The fields are as in `Store`."""

    layout: Layout
    content: ContentStore
    names: Names
    manifests: Manifests
    history: Histories
    copies: Copies
