"""Try to break a `DevicePool` with random operations inside kernels: what `kvtoolkit fuzz` does on a GPU."""

import random
from collections.abc import Callable

import numpy as np

from allocators import BlockAllocator
from allocators.testing.failure import expect, fail
from kvtoolkit.cuda.launching import Launch
from kvtoolkit.cuda.pool import DevicePool
from kvtoolkit.runtime import load
from kvtoolkit.runtime.streams import cupy_on_current_stream
from kvtoolkit.runtime.structs import ParameterStruct

# FuzzFault in cuda_src/pool/fuzz.cu: the promise, and what contradicted it
_FAULTS = {
    1: ("aligned", "granule {granule} was granted as the start of a block of order {found}"),
    2: ("disjoint", "granule {granule} was granted while {found} held it"),
    3: ("disjoint", "granule {granule} was held, and became that of {found}"),
    4: ("proper use is granted", "giving granule {granule} back was refused: {found}"),
    5: ("exact exhaustion", "code {granule} although there was room for all"),
    6: ("only the codes of the header", "{granule}"),
}
_CTA = 128
_MORE_SIZES = 19
_MOST_HELD = 8
_MOST_JOURNALS_NBYTES = 1 << 26
_params = ParameterStruct("pool/fuzz.cu", "kvt_fuzz")


def run_kernels(make: Callable[[], BlockAllocator], seed: int, is_short: bool = False) -> int:
    """Try to break a `DevicePool` from inside kernels; returns how many operations they did, 0 for other allocators.

    Args:
        make: makes a fresh pool; its size does not matter, for other sizes of it are tried.
        seed: of all that is drawn. What threads do to each other is not drawn.
        is_short: try a few sizes.

    Raises:
        ConformanceFailure: a promise was broken.
    """
    like = make()
    if not isinstance(like, DevicePool):
        return 0
    draw = random.Random(seed)
    operations = 0
    sizes = [
        like.num_granules,
        *(8 * draw.randint(1, 1 << draw.randint(1, 13)) for _ in range(2 if is_short else _MORE_SIZES)),
    ]
    for num_granules in sizes:
        pool = DevicePool(num_granules, layout=like.layout, device=like.device)
        operations += attack(pool, draw)
    return operations


def attack(pool: DevicePool, draw: random.Random, *, operations: int = 1 << 20) -> int:
    """Run about ``operations`` random ones in one kernel and check what is left; returns how many they were."""
    threads = draw.choice([1, 32, 33, 1000, 1 << 12, 1 << 15, 1 << 17])
    ctas = -(-threads // _CTA)
    while ctas > 1 and ctas * pool.num_words * 8 > _MOST_JOURNALS_NBYTES:
        threads, ctas = threads // 2, -(-threads // 2 // _CTA)
    held = [] if draw.random() < 0.5 else pool.allocate([1] * draw.randint(0, pool.num_granules // 2)).tolist()
    room = (pool.num_granules - len(held)) // threads
    is_spare = room > 0 and draw.random() < 0.4
    share = min(room, _MOST_HELD) if is_spare else draw.randint(1, _MOST_HELD)
    orders = 1 if is_spare else draw.randint(1, 15)
    rounds = min(4096, max(8, operations // threads))
    before = pool.snapshot()
    with cupy_on_current_stream(pool.device) as cupy:
        owners = cupy.zeros(pool.num_granules, np.int32)
        owners[np.array(held, np.int64)] = -1
        journals, report, done = pool.journals(ctas), cupy.zeros(5, np.int32), cupy.zeros(1, np.uint64)
        addresses = [array.data.ptr for array in (pool.memory, owners, journals, report, done)]
        parameters = _params.pack(
            *addresses, draw.getrandbits(32), threads, rounds, orders, share, int(is_spare),
            draw.randrange(2), 0 if is_spare else draw.randrange(2),
        )  # fmt: skip
        kernel = load("pool/fuzz.cu", "kvt_fuzz", {"KVT_SLAB": int(pool.layout == "slab")}, pool.device)
        Launch(kernel, (ctas,), _CTA, 0, parameters).run(cupy.cuda.get_current_stream().ptr)
        faults, what, thread, granule, found = report.get().tolist()
        number = int(done[0])
        owned, named = owners.get(), bool(journals.any())
    if faults:
        promise, text = _FAULTS[what]
        holder = "the host" if found == -1 else f"thread {found - 1}" if promise == "disjoint" and found > 0 else found
        fail(promise, f"thread {thread} of {threads}: {text.format(granule=granule, found=holder)}; {faults} faults")
    pool.check_integrity()
    pool.complete(pool.epoch)
    expect(not named, "leases", "a journal still names blocks")
    expect(bool((np.flatnonzero(owned) == sorted(held)).all()), "canaries", "an owner's mark was lost")
    expect(pool.snapshot() == before, "recovery", "all was given back, and the pool is not as it was")
    pool.free(held, [1] * len(held))
    return number
