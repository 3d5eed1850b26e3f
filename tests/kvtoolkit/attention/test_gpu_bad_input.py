"""On a GPU: tensors without memory are refused, results are where the queries are, Dynamo stays out."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")

from kvtoolkit import UnsupportedError, append, paged_attention  # noqa: E402
from tests.kvtoolkit.bad_input import MEMORY, TENSOR_DAMAGES  # noqa: E402

pytestmark = pytest.mark.gpu
NAMES = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "sinks", "out")


def good() -> dict[str, torch.Tensor]:
    caches = torch.randn(2, 6, 16, 2, 64, device="cuda", dtype=torch.float16)
    q = torch.randn(2, 4, 64, device="cuda", dtype=torch.float16)
    table, lengths = torch.tensor([[0, 1], [2, 3]]).int().cuda(), torch.tensor([20, 30]).int().cuda()
    arrays = (q, *caches, table, lengths, torch.zeros(4, device="cuda"), torch.zeros_like(q))
    return dict(zip(NAMES, arrays, strict=True))


@pytest.mark.parametrize("damage", MEMORY)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_memory_are_refused(name: str, damage: str):
    arguments = good()
    try:
        arguments[name] = TENSOR_DAMAGES[damage](None, arguments[name])
        if damage == "zero tensor":
            arguments[name] = torch._efficientzerotensor(arguments[name].shape, device="cuda", dtype=torch.float16)
    except NotImplementedError:
        pytest.skip("not for this dtype")
    with pytest.raises(UnsupportedError):
        paged_attention(**arguments)
    assert torch.isfinite(paged_attention(**good())).all()  # the device is well


def test_outputs_that_overlap_are_refused():
    arguments = good()
    cache = arguments["k_cache"]
    with pytest.raises(UnsupportedError, match="out: expected memory of its own, got some that k_cache uses"):
        paged_attention(**arguments | {"out": cache.view(-1)[:512].view(2, 4, 64)})
    with pytest.raises(UnsupportedError, match="out: expected every element in a place of its own"):
        paged_attention(**arguments | {"out": torch.zeros_like(arguments["q"][:1]).expand(2, -1, -1)})
    new, slot = torch.ones(1, 2, 64, device="cuda", dtype=torch.float16), torch.tensor([3], device="cuda")
    with pytest.raises(UnsupportedError, match="v_cache: expected memory of its own"):
        append(new, new, cache, cache, slot, layout="NHD")


def test_results_are_where_the_queries_are_and_a_cache_counts_as_changed():
    arguments = good()
    del arguments["out"]
    expected = paged_attention(**arguments)
    with torch.device("cpu"):
        assert torch.equal(paged_attention(**arguments), expected)
    new, slot = torch.ones(1, 2, 64, device="cuda", dtype=torch.float16), torch.tensor([3], device="cuda")
    k_cache, v_cache = arguments["k_cache"], arguments["v_cache"]
    before = k_cache._version, v_cache._version
    append(new, new, k_cache, v_cache, slot, layout="NHD")
    assert k_cache._version > before[0]
    assert v_cache._version > before[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_call_gives_what_it_gives_as_it_is(backend: str):
    arguments = good()
    q = arguments.pop("q")
    del arguments["out"]
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        return paged_attention(x * 0.5, **arguments) * 2

    compiled = torch.compile(run, backend=backend)
    for i in range(3):
        assert torch.allclose(compiled(q + i), run(q + i))
