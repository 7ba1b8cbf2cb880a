"""What a pod does with nothing but the read-only mount of the cache."""
