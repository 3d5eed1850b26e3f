"""Hooks of ``mkdocs build``: the site must be whole by itself."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)[^>]*>""")
_NOT_FETCHED = re.compile(r"""rel=["']?(?:canonical|edit|alternate|next|prev)\b""")


def on_post_build(config: Any, **_: Any) -> None:
    """Fail if a page would fetch a script, a style, a font or a picture from another host."""
    foreign = {
        f"{page.name}: {found[1]}"
        for page in Path(config["site_dir"]).rglob("*.html")
        for found in _FETCHED.finditer(page.read_text())
        if not _NOT_FETCHED.search(found[0])
    }
    if foreign:
        raise PluginError(f"pages that fetch from elsewhere: {', '.join(sorted(foreign))}")
