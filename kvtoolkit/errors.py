"""What can go wrong in kvtoolkit, each error also of the builtin kind that a caller would catch.

Every message says which argument, what was expected and what came. A call that raises has changed nothing.
"""


class KVToolkitError(Exception):
    """Base of every error that kvtoolkit raises on purpose."""


class ConfigError(KVToolkitError, ValueError):
    """A configuration value, or a combination of them, makes no sense."""


class ArgumentError(KVToolkitError, ValueError):
    """A plain argument, such as a number of tokens, makes no sense."""


class ShapeError(KVToolkitError, ValueError):
    """An array has the wrong shape, dtype, strides or values out of range."""


class UnsupportedError(KVToolkitError, NotImplementedError):
    """No kernel for this combination, or no such device here."""


class CompileError(KVToolkitError, RuntimeError):
    """A CUDA source does not compile; the message holds the options and the compiler's log."""


class DeviceError(KVToolkitError, RuntimeError):
    """The CUDA driver refuses a launch."""


class SequenceError(KVToolkitError, LookupError):
    """A sequence id is unknown, closed, given twice, or in a state that does not allow the call."""


class StepError(KVToolkitError, RuntimeError):
    """A step is used after its end, or the cache is changed while the step is open."""


class BusyError(KVToolkitError, RuntimeError):
    """A call of a cache from inside another one of the same thread: by a signal handler, a finalizer or a plug-in."""


class CacheFullError(KVToolkitError, MemoryError):
    """No row or no block is left for a call that takes all or nothing."""


class CacheSnapshotError(KVToolkitError, ValueError):
    """A cache snapshot is damaged or belongs to another configuration."""
