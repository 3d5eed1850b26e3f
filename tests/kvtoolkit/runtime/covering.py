"""A choice among many kernels in which every two settings that occur together in one of them still do."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

from kvtoolkit.cuda.specs import Spec

Item = tuple[Spec, str]
"""A kernel and the architecture that it is compiled for."""


def pairs_of(item: Item) -> frozenset[tuple[tuple[str, str | int], ...]]:
    """Every two settings of a kernel: its macros, its architecture, and whether it tells masses."""
    spec, arch = item
    settings = {"arch": arch, "KVT_MASSES": 0, **dict(spec.defines)}
    return frozenset(combinations(sorted(settings.items()), 2))


def covering(items: Iterable[Item]) -> list[Item]:
    """Some of the kernels, greedily chosen. Those with most macros come first, because they need most registers."""
    by_name: dict[str, dict[Item, frozenset]] = defaultdict(dict)
    for item in sorted(items, key=lambda item: -len(item[0].defines)):
        by_name[item[0].name][item] = pairs_of(item)
    chosen = []
    for pairs in by_name.values():
        missing = frozenset().union(*pairs.values())
        while missing:
            best = max(pairs, key=lambda item: len(pairs[item] & missing))
            missing -= pairs[best]
            chosen.append(best)
    return chosen
