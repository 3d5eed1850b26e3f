"""Every GPU kernel once at awkward sizes, for the sanitizers:

    compute-sanitizer --tool memcheck --report-api-errors no python -m tests.kvtoolkit.sanitize

and with racecheck and synccheck. Without ``--report-api-errors no`` memcheck also counts the functions that Numba's
binding asks an older driver for.
"""

import random

import numpy as np

from kvtoolkit import DevicePool, get_include
from kvtoolkit.attention.calls import append, merge_states
from kvtoolkit.commands.fuzz_kernels import attack
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.gpu_cases import assert_close, check, run, to_device
from tests.kvtoolkit.attention.prompt_parts import ragged
from tests.kvtoolkit.attention.test_attention import SINKS, SLOPES
from tests.kvtoolkit.attention.test_gpu_tiered import run as run_tiered
from tests.kvtoolkit.attention.test_gpu_tiered import test_conversions_give_the_codes_of_the_judge
from tests.kvtoolkit.attention.tiered_cases import TieredCase
from tests.kvtoolkit.cache.test_gpu_cache import drive, make, tensor
from tests.kvtoolkit.cache.test_gpu_tiers_cache import test_steps_attend_to_all_tiers
from tests.kvtoolkit.cuda.test_gpu_pool import SOURCE, launch
from tests.kvtoolkit.cuda.test_shared import Batch

OPTIONS = {"window_size": (60, 2), "causal": False, "softcap": 30.0, "sinks": SINKS, "alibi_slopes": SLOPES}


def pool(layout: str) -> None:
    """Blocks taken and given back inside kernels, alone and by warps, and batches of the host."""
    import cupy

    names = ("Pool", "SlabPool") if layout == "buddy" else ("SlabPool", "Pool")
    options = ("-std=c++17", f"-I{get_include()}", f"-DKVT_POOL={names[0]}", f"-DKVT_OTHER={names[1]}")
    kernels = cupy.RawModule(code=SOURCE, options=options)
    there = DevicePool(200, layout=layout)
    there.free(there.allocate([1, 2, 4, 8, 1]), [1, 2, 4, 8, 1])
    starts, wrong = cupy.empty(512, cupy.int32), cupy.zeros(1, cupy.int32)
    for how in (0, 1, 2, 0x21):
        launch(kernels, "take_once", 300, there.memory, starts, *map(np.int32, (300, -1, how)))
        launch(kernels, "give_back", 300, there.memory, starts, *map(np.int32, (300, how)))
        canaries = cupy.zeros(200, cupy.uint32)
        arguments = (canaries, np.int32(3), np.int32(how), wrong, np.intp(0), np.int32(200))
        launch(kernels, "churn", 300, there.memory, *arguments)
    journals = there.journals(2 * 2)
    launch(kernels, "speculate", 64, there.memory, journals, np.int32(1), np.int32(0), starts, threads=32)
    starts = cupy.asarray(there.allocate(np.ones(200, int)))
    launch(kernels, "retire", 200, there.memory, starts, np.int32(200), np.int32(1))
    there.complete(0)
    assert int(wrong[0]) == 0
    assert there.num_free == 200
    attack(DevicePool(2048, layout=layout), random.Random(1), operations=1 << 12)


def tiers() -> None:
    """Sequences in tiers, their masses and conversions, and a cache that demotes."""
    for head_dim in (64, 128):
        for new in (None, [1, 0, 5, 8]):
            case = TieredCase([1, 0, 200, 1000], new, head_dim=head_dim, dtype="bfloat16")
            arrays = case.tiered()
            run_tiered(case, arrays, block_mass=to_device(case.no_masses(arrays), ""), window_size=(300, -1))
            run_tiered(case, arrays, num_splits=2)
        prompts = TieredCase([200, 900, 64], [40, 20, 1], head_dim=head_dim, dtype="bfloat16")
        run_tiered(prompts, prompts.tiered())
    for head_dim in (64, 128):
        test_conversions_give_the_codes_of_the_judge(head_dim, "float16", at_the_edge=True)
    test_steps_attend_to_all_tiers("cuda")


def shared_reads() -> None:
    """Rows that begin with the same blocks, in order and not."""
    for head_dim, is_mixed in ((128, False), (64, True)):
        batch = Batch(6, has_entries=True, has_bounds=True, is_mixed=is_mixed, head_dim=head_dim)
        ((out, _),), _, _, _ = batch.attend(True)
        assert np.isfinite(out).all()


def main() -> None:
    tiers()
    shared_reads()
    pool("buddy")
    pool("slab")
    for head_dim in (64, 80, 128, 256):
        case = Case([1, 0, 9, 130, 700], head_dim=head_dim, dtype="bfloat16")  # decode
        check(case, case.variable(), num_splits=3)
        check(case, case.paged(5, "NHD"))
        case = Case([2300], num_q_heads=8, num_kv_heads=1, head_dim=head_dim, dtype="bfloat16")  # pieces in two rounds
        check(case, case.paged(16, "HND"), "HND", num_splits=35)
        case = Case([100, 0, 70, 12], [1, 0, 40, 8], head_dim=head_dim, dtype="float16")  # verify and prefill
        check(case, case.variable(), **OPTIONS)
        check(case, case.paged(16, "HND"), "HND")
    case = Case([70, 300], num_q_heads=32, num_kv_heads=2, head_dim=128, dtype="float16")  # 16 rows
    check(case, case.variable(), num_splits=2)
    check(case, case.variable())
    case = Case([3000], num_q_heads=32, num_kv_heads=8, head_dim=128, dtype="float16")  # a cluster
    check(case, case.paged(16, "HND"), "HND")
    pooled = ragged((36, 20, 1), (9, 5, 6))  # items in 9 and 5 parts, which are merged in two rounds
    assert_close(*run(pooled, pooled.arrays, "HND"), *pooled.expected(), pooled.dtype)
    case = Case([100, 0, 70], [1, 0, 40], dtype="bfloat16")
    check(case, case.variable(), backend="numba", **OPTIONS)
    for _ in drive(make("cuda"), tensor):  # a cache: layers that begin before the one in front has ended, moves
        pass

    import cupy
    import torch

    from kvtoolkit import cuda
    from kvtoolkit.arrays.call import attention_call
    from kvtoolkit.cpu import Operand
    from kvtoolkit.cuda.check import check_slots, check_tables

    new = torch.randn(5, 3, 40, device="cuda").half()
    caches = torch.zeros(2, 4, 3, 8, 40, device="cuda").half()
    slots = to_device(np.array([0, 31, -1, 8, 9]), "")
    append(new, new, *caches, slots, layout="HND")
    append(new[..., 1:33], new[..., 3:35], *caches[..., :32].contiguous(), slots, layout="HND")
    lse = torch.randn(5, 3, device="cuda")
    merge_states(new, lse, new, lse)
    arena = cupy.zeros((4, 600, 3, 8, 24), np.uint16)
    described = Operand(arena.data.ptr, arena.shape, tuple(s // 2 for s in arena.strides), "float16", arena, True, 0)
    cuda.copy_granules(described, np.arange(290), np.arange(300, 590))
    table = to_device(np.array([[1, 2], [3, -1]], np.int32), "")
    lengths = to_device(np.array([9, 8], np.int32), "")
    q, cache, *tables = (cuda.device_operand(array, "array") for array in (new[:2], caches[0], table, lengths, slots))
    check_tables(attention_call(q, cache, cache, tables[0], None, tables[1], out=q), 0)
    check_slots(tables[2], 8, 4, 0)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
