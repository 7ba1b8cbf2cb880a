"""The commands of a pod that has nothing but the read-only mount of the cache."""
