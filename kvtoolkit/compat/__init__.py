"""Former places of modules, kept importable."""
