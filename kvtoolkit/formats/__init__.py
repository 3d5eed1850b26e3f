"""How bits and bytes are laid out: entries of block tables, quantized blocks, the caches of all tiers."""

from kvtoolkit.formats.quantized import BLOCK, FORMATS, HEAD_DIMS, INT4, INT8, Format, check_head_dim

__all__ = ["BLOCK", "FORMATS", "HEAD_DIMS", "INT4", "INT8", "Format", "check_head_dim"]
