"""The one list of allocators: whoever joins it gets the whole suite."""

from collections.abc import Callable

from allocators import BlockAllocator, EpochPool, create

POOL_SIZES = (8, 24, 64, 200, 1024)

# name, options
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "paged-8": ("paged", {"block_sizes": [8]}),
    "paged-16": ("paged", {"block_sizes": [16]}),
    "paged-32": ("paged", {"block_sizes": [32]}),
    "paged-64": ("paged", {"block_sizes": [64]}),
    "buddy": ("buddy", {}),
    "buddy-8-32": ("buddy", {"block_sizes": [8, 32]}),
    "slab": ("slab", {}),
    "lockfree": ("lockfree", {}),
    "lockfree-slab": ("lockfree", {"layout": "slab"}),
}


def maker(kind: str, num_granules: int) -> Callable[[], BlockAllocator]:
    """What the kit asks for: makes a fresh pool of this kind."""
    name, options = KINDS[kind]
    return lambda: create(name, num_granules, **options)


def epoch_maker(kind: str, num_granules: int) -> Callable[[], BlockAllocator]:
    """What `maker` makes, inside an `EpochPool`."""
    make = maker(kind, num_granules)
    return lambda: EpochPool(make())
