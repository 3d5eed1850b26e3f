"""The Python of the README: all of it parses and imports what exists, and what stands alone runs."""

import ast
import re
from pathlib import Path

import pytest

from kvtoolkit import eviction, growth

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STAND_ALONE = {
    "the loop": "prompts = [[1, 2, 3",
    "tiers": "tiers = {",
    "blocks of one's own": "warm = INT8.encode",
    "policies": 'eviction.register("shallow"',
}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_parses_and_imports_what_exists(block):
    for node in ast.parse(block).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            needed = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            pytest.importorskip(str(needed).split(".")[0])
            try:
                exec(ast.unparse(node), {})
            except ModuleNotFoundError as error:
                if str(error.name).split(".")[0] == "kvtoolkit":
                    raise
                pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("what", STAND_ALONE)
def test_what_stands_alone_runs(what, capsys, monkeypatch):
    for registry in (eviction, growth):
        monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    (block,) = (block for block in BLOCKS if STAND_ALONE[what] in block)
    sizes = "num_layers=1, num_kv_heads=1, head_dim=64, num_tokens=4096"
    names = {}
    exec("from kvtoolkit import CacheConfig", names)
    exec(block.replace("CacheConfig(...", f"CacheConfig({sizes}"), names)
    if what == "the loop":
        assert "num_seqs=0" in capsys.readouterr().out
