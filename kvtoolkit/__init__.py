"""kvtoolkit: the KV cache of LLM inference as parts that can be swapped and measured against each other."""

from kvtoolkit._version import __version__

__all__ = ["__version__"]
