"""The errors of allocators; each is also of the builtin type that a caller would catch."""


class AllocatorError(Exception):
    """Base of every error that `allocators` raises on purpose. The allocator is as it was before the call."""


class OutOfBlocksError(AllocatorError, MemoryError):
    """The pool cannot grant the request now."""


class ContendedError(OutOfBlocksError):
    """Other threads changed the pool too fast to decide whether the request fits. Nothing was taken; try again."""


class InvalidSizeError(AllocatorError, ValueError):
    """A size is not a block size of this allocator, or an argument has the wrong shape or dtype."""


class InvalidFreeError(AllocatorError, ValueError):
    """A freed run is out of range, was never granted, is free already, or is given twice in one call."""


class BusyError(AllocatorError, RuntimeError):
    """A signal handler, a finalizer or a plug-in made a call while another call of the same thread was under way."""


class LeaseError(AllocatorError, RuntimeError):
    """A lease is used after its end, or its blocks are freed without it."""


class UnknownStreamError(AllocatorError, LookupError):
    """No stream of this name was registered with the pool."""


class SnapshotError(AllocatorError, ValueError):
    """A snapshot is damaged, or was taken from another kind or size of pool."""


class UnknownAllocatorError(AllocatorError, LookupError):
    """There is no allocator of this name or path."""


class IntegrityError(AllocatorError, AssertionError):
    """An invariant does not hold: a defect of the allocator, never of its caller."""
