"""Asks a Hub whether the owner of a token may download a repository."""

from __future__ import annotations

from typing import Protocol

from cachd.model import Extent, File, Manifest, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.source import Body, Source


class _Hub(Source, Protocol):
    def touch(self, file: File, cancel_token: CancelToken) -> None: ...


class HubCaller:
    """A source that a caller's own token reads. `hub`: the Hub, with that token.

    The description of a gated repository is public, so `resolve` also requests a byte of the largest file.
    """

    def __init__(self, hub: _Hub) -> None:
        self._hub = hub

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`. Raises NotFound or Forbidden if the caller may not download it."""
        manifest = self._hub.resolve(ref, cancel_token)
        largest = max(manifest.files, key=lambda file: file.size)
        if largest.size:
            self._hub.touch(largest, cancel_token)
        return manifest

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Body:
        """See `Source.open`."""
        return self._hub.open(file, extent, cancel_token)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._hub.anew()
