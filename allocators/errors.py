"""What can go wrong in an allocator, each error also of the builtin kind that a caller would catch."""


class AllocatorError(Exception):
    """Base of every error that `allocators` raises on purpose. The allocator is as it was before the call."""


class OutOfBlocksError(AllocatorError, MemoryError):
    """The pool cannot grant the request now."""


class ContendedError(OutOfBlocksError):
    """Other threads changed the pool too fast to decide whether the request fits. Nothing was taken; try again."""


class InvalidSizeError(AllocatorError, ValueError):
    """A size is no block size of this allocator, or an argument has the wrong shape or dtype."""


class InvalidFreeError(AllocatorError, ValueError):
    """A freed run is out of range, was never handed out, is free already, or stands twice in one call."""


class BusyError(AllocatorError, RuntimeError):
    """A call from inside another one of the same thread: by a signal handler, a finalizer or a plug-in."""


class LeaseError(AllocatorError, RuntimeError):
    """A lease is used after its end, or its blocks are touched around it."""


class UnknownStreamError(AllocatorError, LookupError):
    """No stream of this name was registered with the pool."""


class SnapshotError(AllocatorError, ValueError):
    """A snapshot is damaged, or was taken from another kind or size of pool."""


class UnknownAllocatorError(AllocatorError, LookupError):
    """No allocator goes by this name or path."""


class IntegrityError(AllocatorError, AssertionError):
    """An invariant does not hold: a defect of the allocator, never of its caller."""
