"""Families of transformers: each equals its own cache on batches padded on the left, or is refused by `for_model`."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.kvtoolkit.integrations import families  # noqa: E402

OFTEN = {
    "llama": "equal", "mistral": "equal", "qwen3": "equal", "qwen2_moe": "equal", "phimoe": "equal", "gemma2": "equal",
    "gemma3_text": "equal", "gpt_oss": "equal", "llama4_text": "equal", "gpt2": "equal",
    "deepseek_v3": "refused", "bloom": "refused", "diffllama": "refused",
}  # fmt: skip


@pytest.mark.parametrize("family", OFTEN)
def test_a_family_gives_what_its_own_cache_gives_or_is_refused(family, quiet):
    if family not in families.families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    verdict = families.judge(family)
    assert verdict.status == OFTEN[family], verdict


def test_the_table_of_the_documentation_has_the_families_that_are_tested_often(request):
    version, table = families.read_table()
    assert {family: table[family] for family in OFTEN} == OFTEN
    assert "different" not in table.values()
    new = sorted(set(families.families()) - set(table))
    if version != transformers.__version__ or new:
        request.node.user_properties.append(
            ("note", f"docs/models.md is of transformers {version}, here is {transformers.__version__}; "
                     f"families that it does not know: {', '.join(new) or 'none'}")
        )  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("family", families.families())
def test_no_family_gives_anything_else(family, request, quiet):
    verdict = families.judge(family)
    assert verdict.status != "different", verdict
    if verdict.status == "unknown":
        request.node.user_properties.append(("note", f"{family} could not be made or run: {verdict.detail[:120]}"))
