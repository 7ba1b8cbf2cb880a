"""The store: everything that touches the cache's directory on disk."""
