"""Where bytes rest: everything that touches the cache's directory."""
