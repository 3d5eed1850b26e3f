"""The Python of the README and of the pages in docs: the blocks of a page run, one after the other."""

import ast
import re
from pathlib import Path

import pytest

from allocators import registry
from kvtoolkit import eviction, growth

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- needs: ([\w, ]+) -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): [(set(re.findall(r"\w+", needs or "")), code) for needs, code in found]
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (found := BLOCK.findall(path.read_text()))
}
FENCE = re.compile(r"^[\s>*+\-\d.]*(?:```+|~~~+)[ \t]*(?:\{[^}\n]*\.|\{[ \t]*)?py", re.MULTILINE | re.IGNORECASE)
"""The opening of a block of Python in whatever form Markdown has."""
ON_GPU = [name for name, blocks in PAGES.items() if any("gpu" in needs for needs, _ in blocks)]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Registries that forget what a page registers, and a folder for the files that it writes."""
    for policies in (eviction, growth):
        monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.chdir(tmp_path)


def run(page, allowed):
    """Run the blocks of a page whose needs are allowed, line numbers as in the page; returns how many ran."""
    text, names, count = (ROOT / page).read_text(), {"__name__": "page"}, 0
    for needs, code in PAGES[page]:
        if needs <= allowed:
            for need in needs - {"gpu"}:
                pytest.importorskip(need)
            line = text[: text.index(code)].count("\n")
            exec(compile("\n" * line + code, page, "exec"), names)
            count += 1
    return count


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, fresh):
    everywhere = [needs for needs, _ in PAGES[page] if "gpu" not in needs]
    if not everywhere:
        pytest.skip("all blocks need a GPU")
    assert run(page, {"torch", "transformers", "hypothesis"}) == len(everywhere)


@pytest.mark.gpu
@pytest.mark.parametrize("page", ON_GPU)
def test_the_blocks_of_a_page_run_on_a_gpu(page, fresh):
    assert run(page, {"torch", "transformers", "hypothesis", "gpu"}) == len(PAGES[page])


@pytest.mark.parametrize("page", ON_GPU)
def test_blocks_for_a_gpu_parse_and_import_what_exists(page):
    for _, code in PAGES[page]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                needed = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                pytest.importorskip(str(needed).split(".")[0])
                try:
                    exec(ast.unparse(node), {})
                except ModuleNotFoundError as error:
                    if str(error.name).split(".")[0] == "kvtoolkit":
                        raise
                    pytest.skip(f"{error.name} is not installed")


def test_no_block_is_left_out():
    """A fence in another form would be shown, and never run."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert len(FENCE.findall(page.read_text())) == len(PAGES.get(str(page.relative_to(ROOT)), [])), page


@pytest.mark.parametrize(
    "opening",
    ["```python", "~~~python", "~~~~ py", "````python", "  ```python", "``` {.python}", "> ```python", "- ~~~Python",
     "1. ```pycon", '``` { .no-copy .py title="a" }'],
)  # fmt: skip
def test_every_form_of_a_fence_is_known(opening):
    assert FENCE.search(f"text\n\n{opening}\nx = 1\n")
    assert not FENCE.search("```\npython\n```\n```sh\npython -m x\n```\n")
