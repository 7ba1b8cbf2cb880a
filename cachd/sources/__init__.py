"""Where bytes come from. Nothing here touches the cache's directory."""
