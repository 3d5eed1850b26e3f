"""What a query does not see never reaches it, whatever it holds, and what it sees does: every kernel and backend."""

import itertools
from typing import Any

import numpy as np
import pytest

from kvtoolkit import merge_states, reference
from tests.kvtoolkit.attention import unseen_cases
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.tiered_cases import TieredCase

BACKENDS = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "numba"))]
LENGTHS = [100, 37, 65, 130, 0, 5]
NEW: dict[str, list[int] | None] = {
    "decode": None, "verify": [3, 8, 5, 1, 0, 4], "rows": [6, 7, 5, 8, 0, 3], "prompt": [33, 20, 9, 10, 0, 5],
}  # fmt: skip
TILES = {"mixed": ["hw", "c", "wc", "chw", "", "h"]} | {
    letter: [letter * (-(-n // 64)) for n in LENGTHS] for letter in "hwc"
}


def runner(backend: str) -> unseen_cases.Run:
    """What runs a case on a backend."""
    if backend == "cpu":
        return lambda case, arrays, **options: case.run(arrays, **options)
    from tests.kvtoolkit.attention import gpu_cases, test_gpu_tiered

    def run(case: Case, arrays: Any, **options: Any) -> Any:
        run_case: Any = test_gpu_tiered.run if isinstance(case, TieredCase) else gpu_cases.run
        return run_case(case, arrays, backend=backend, **options)

    return run


def check(backend: str, make: Any, arrays_of: Any, name: str, num_q_heads: int, **more: Any) -> None:
    """Run `unseen_cases.check` with options by their name; some query sees a number that is none, where one can."""
    seen = unseen_cases.check(make, arrays_of, runner(backend), **unseen_cases.options_of(name, num_q_heads), **more)
    is_many = make().cu_seqlens_q is not None
    assert (seen > 0) == (is_many and name != "acausal")


@pytest.mark.parametrize("name", unseen_cases.OPTIONS)
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_with_every_option(backend: str, new: str, name: str) -> None:
    heads = 12 if new == "rows" else 6  # more than 8 query rows of a kv head
    check(
        backend, lambda: Case(LENGTHS, NEW[new], num_q_heads=heads, head_dim=64, dtype="float16"), Case.variable, name,
        heads,
    )  # fmt: skip


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_blocks(backend: str, block_size: int, new: str) -> None:
    check(
        backend, lambda: Case(LENGTHS, NEW[new], head_dim=64, dtype="bfloat16"),
        lambda case: case.paged(block_size, "NHD"), "window", 6,
    )  # fmt: skip


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [("cpu", 24), ("cpu", 128), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (16, 80, 128, 192, 256))],
)
def test_head_dims(backend: str, head_dim: int, new: str) -> None:
    check(
        backend, lambda: Case(LENGTHS, NEW[new], head_dim=head_dim, dtype="float16"), Case.variable, "window", 6
    )  # fmt: skip


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_of_many_heads(backend: str, new: int) -> None:
    # on a GPU from sm_90 on CTAs share it as a cluster
    def make() -> Case:
        return Case([300], [new], num_q_heads=16, num_kv_heads=8, head_dim=64, dtype="float16")

    options = unseen_cases.options_of("window", 16)
    assert (unseen_cases.check(make, Case.variable, runner(backend), **options) > 0) == (new > 1)


def tiered_cases() -> list[Any]:
    """Backend, tiles, new tokens and options: on a GPU all of them, on the CPU those that differ there."""
    found = []
    for tiles, new, name in itertools.product(TILES, ("decode", "verify", "prompt"), unseen_cases.OPTIONS):
        if name == "both" or (tiles == "mixed" and new == "verify"):
            found.append(("cpu", tiles, new, name))
        found += [pytest.param(one, tiles, new, name, marks=pytest.mark.gpu) for one in ("cuda", "numba")]
    return found


@pytest.mark.parametrize(("backend", "tiles", "new", "name"), tiered_cases())
def test_tiers_with_every_option(backend: str, tiles: str, new: str, name: str) -> None:
    check(
        backend, lambda: TieredCase(LENGTHS, NEW[new], dtype="float16", patterns=TILES[tiles]), TieredCase.tiered, name,
        6,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_side_that_is_nan_is_not_dropped_in_a_merge(backend: str) -> None:
    torch = pytest.importorskip("torch")
    device = "cpu" if backend == "cpu" else "cuda"
    outs = torch.ones(2, 2, 4, 16, dtype=torch.float16, device=device)
    lses = torch.zeros(2, 2, 4, device=device)
    lses[0, 0] = torch.tensor([torch.nan, -torch.inf, 1.0, torch.nan])
    lses[1, 0] = torch.tensor([1.0, 2.0, -torch.inf, torch.nan])
    outs[0, 0, 1] = outs[1, 0, 2] = torch.nan  # of sides that saw nothing
    out, lse = merge_states(outs[0], lses[0], outs[1], lses[1], backend=backend)
    with np.errstate(invalid="ignore"):
        good, good_lse = reference.merge_states(*(one.cpu() for pair in zip(outs, lses, strict=True) for one in pair))
    np.testing.assert_allclose(out.cpu().numpy(), good, rtol=1e-3)
    np.testing.assert_allclose(lse.cpu().numpy(), good_lse, rtol=1e-5)
    assert np.isnan(good_lse).sum() == 2


@pytest.mark.parametrize("with_masses", [False, True])
@pytest.mark.parametrize("new", ["decode", "verify"])
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_that_also_give_masses(backend: str, new: str, with_masses: bool) -> None:
    import torch

    for kind, arrays_of in ((Case, Case.variable), (TieredCase, TieredCase.tiered)):
        masses = torch.empty(len(LENGTHS), 40, 2, device="cuda") if with_masses else None

        def make(kind: Any = kind) -> Case:
            return kind(LENGTHS, NEW[new], head_dim=128, dtype="bfloat16")

        options = unseen_cases.options_of("both", 6)
        unseen_cases.check(make, arrays_of, runner(backend), block_mass=masses, **options)


@pytest.mark.parametrize("new", [1, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_all_score_minus_infinity_count_as_none(backend: str, new: int) -> None:
    case = Case([20], [new], head_dim=64, dtype="float16")
    case.q[..., 7], case.keys[0][..., 7] = 1.0, -np.inf
    arrays = case.variable()
    for out, lse in (runner(backend)(case, arrays), case.expected(arrays)):
        assert (out == 0).all()
        assert np.isneginf(lse).all()
