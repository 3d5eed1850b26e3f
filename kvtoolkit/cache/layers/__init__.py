"""What the layers of a step do with the cache."""
