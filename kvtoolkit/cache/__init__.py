"""The KV cache: its interface, and one operation a file."""
