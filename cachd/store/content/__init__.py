"""The content store: verified, immutable blobs, each named by its digest."""

from cachd.store.content.content import ContentStore

__all__ = ["ContentStore"]
