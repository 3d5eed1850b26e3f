"""The example engine's kernels for steps of few rows compute what the layers of transformers do."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from examples import few_rows  # noqa: E402
from examples.few_rows import FewRows, fits  # noqa: E402
from examples.llama import PackedLlama, embed, few_rows_of, logits  # noqa: E402
from examples.measure import difference  # noqa: E402

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
AWKWARD = {"hidden_size": 104, "intermediate_size": 328, "num_attention_heads": 4, "num_key_value_heads": 1}
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # two roundings to 11 and to 8 bits


def model_of(shape, dtype=torch.float16, kind="Llama", **options):
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "vocab_size": 500, "head_dim": 64, "initializer_range": 0.1} | shape | options
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    for layer in model.model.layers:  # a norm's weight is 1 in a new model
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            torch.nn.init.normal_(norm.weight, 1, 0.3)
    return model.to(dtype).eval()


def assert_as_layers(model, few, num_rows):
    """What `FewRows` gives for random rows is, up to rounding, what the layer gives."""
    torch.manual_seed(num_rows)
    layer, config = PackedLlama(model).layers[1], model.config
    angles = 6.28 * torch.rand(num_rows, 1, 32).repeat(1, 1, 2)
    hidden, attended = torch.randn(num_rows, config.hidden_size), torch.randn(num_rows, config.num_attention_heads, 64)
    hidden, attended, cos, sin = (
        x.to(model.device, model.dtype) for x in (hidden, attended, angles.cos(), angles.sin())
    )
    found = [*few.project(layer, hidden, cos, sin), few.finish(layer, hidden, attended)]
    expected = [*layer.project(hidden, cos, sin), layer.finish(hidden, attended)]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= TOLERANCES[model.dtype] * other.double().norm()


# -- on any machine --------------------------------------------------------------------------------------------------


class Twin:
    """A kernel in PyTorch, launched as one of Triton: what one program computes, for each program of the grid."""

    def __init__(self, program):
        self.program = program

    def __getitem__(self, grid):
        def launch(*arguments, PARTS, SIZE, ROWS, **options):
            assert options["K"] <= PARTS * SIZE
            assert len(arguments[0]) <= ROWS
            for index in range(*grid):
                self.program(index, *arguments, **options)

        return launch


def normalize(x, norm, eps):
    exact = x.float()
    return norm * (exact * (exact.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def pairs_of(index, count, half, num_pairs):
    """The first column of each pair of a program."""
    pairs = torch.arange(index * count, min((index + 1) * count, num_pairs))
    return pairs // half * 2 * half + pairs % half


def norm_project_rotate(
    index, x, norm, weight, cos, sin, out, num_rows, eps, *, NUM_ROTATED, HALF, N, K, PAIRS, **options
):  # fmt: skip
    first, x = pairs_of(index, PAIRS, HALF, N // 2), normalize(x, norm, eps)
    low, high = (x @ weight.view(N, K)[columns].T for columns in (first, first + HALF))
    turns, dims = first // (2 * HALF) < NUM_ROTATED, first % (2 * HALF)
    c, s = torch.where(turns, cos[:, 0, dims], 1), torch.where(turns, sin[:, 0, dims], 0)
    out = out.view(num_rows, N)
    out[:, first], out[:, first + HALF] = low * c - high * s, high * c + low * s


def norm_gate_up(index, x, norm, weight, out, num_rows, eps, *, HALF, N, K, PAIRS, **options):
    first, x = pairs_of(index, PAIRS, HALF, N // 2), normalize(x, norm, eps)
    gate, up = (x @ weight.view(N, K)[columns].T for columns in (first, first + HALF))
    out.view(num_rows, HALF)[:, first] = torch.nn.functional.silu(gate) * up


def product_add(index, x, weight, residual, out, num_rows, *, N, K, COLUMNS, **options):
    columns = slice(index * COLUMNS, (index + 1) * COLUMNS)
    out.view(num_rows, N)[:, columns] = residual[:, columns] + x.reshape(num_rows, K) @ weight.view(N, K)[columns].T


TWINS = SimpleNamespace(
    norm_project_rotate=Twin(norm_project_rotate), norm_gate_up=Twin(norm_gate_up), product_add=Twin(product_add)
)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [SMOLLM2, AWKWARD], ids=["SmolLM2", "awkward"])
def test_the_programs_of_a_launch_compute_every_column(shape):
    few = FewRows(TWINS, embed, logits, overlaps=False)
    assert_as_layers(model_of(shape), few, 3)


@pytest.fixture
def with_memory(monkeypatch):
    """A machine whose GPU has so much shared memory for a program as an H200."""
    monkeypatch.setattr(few_rows, "shared_memory", lambda device: 232448)


UNFIT = {
    "biases of queries": {"kind": "Qwen2"},
    "biases": {"attention_bias": True},
    "biases of the MLP": {"mlp_bias": True},
    "norms of heads": {"kind": "Qwen3"},
    "a norm of its own": {"kind": "Gemma", "hidden_act": "silu"},
    "another activation": {"hidden_act": "gelu"},
    "float32": {"dtype": torch.float32},
    "long rows": {"hidden_size": 2056},
    "a wide MLP": {"intermediate_size": 4104},
}


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_the_kernels_fit_models_like_llama(with_memory, kind):
    model = model_of(SMOLLM2, kind=kind)
    assert fits(model, PackedLlama(model).layers)


@pytest.mark.parametrize("options", UNFIT.values(), ids=UNFIT)
def test_the_kernels_do_not_fit_what_they_do_not_know(with_memory, options):
    model = model_of(AWKWARD, **options)
    assert not fits(model, PackedLlama(model).layers)


def test_a_model_that_is_not_on_a_gpu_does_without():
    assert PackedLlama(model_of(AWKWARD), fused=True).of_few_rows is None


# -- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(shape, dtype):
    """A model on the GPU, and its `FewRows`."""
    model = model_of(shape, dtype).to("cuda")
    return model, few_rows_of(model, PackedLlama(model).layers)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize(("shape", "dtype"), [(SMOLLM2, torch.bfloat16), (AWKWARD, torch.float16)], ids=str)
def test_kernels_compute_what_a_layer_does(shape, dtype, num_rows):
    model, few = on_gpu(shape, dtype)
    assert_as_layers(model, few, num_rows)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize(("num_rows", "padded"), [(1, 2), (3, 4), (5, 8), (9, 16)])
def test_padding_leaves_a_row_as_it_is(num_rows, padded):
    model, few = on_gpu(SMOLLM2, torch.bfloat16)
    layer = PackedLlama(model).layers[0]
    hidden = torch.randn(padded, 576, device="cuda", dtype=torch.bfloat16)
    attended = torch.randn(padded, 9, 64, device="cuda", dtype=torch.bfloat16)
    alone = few.finish(layer, hidden[:num_rows], attended[:num_rows])
    assert torch.equal(alone, few.finish(layer, hidden, attended)[:num_rows])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 64])
def test_a_captured_step_gives_the_logits_of_an_eager_one(batch):
    """At a batch of 64 the layers are fused by torch.compile."""
    model = model_of(SMOLLM2, torch.bfloat16, vocab_size=49152, initializer_range=0.02).to("cuda")
    assert PackedLlama(model, fused=True).of_few_rows
    assert difference(model, batch, 100)[1] < 0.03
