"""What an engine knows of the future of its sequences: hints to a cache with host memory."""

from allocators._calls import Calls, exclusive
from kvtoolkit.arrays.types import ArrayLike
from kvtoolkit.cache.state.block_table import OPEN
from kvtoolkit.cache.state.cache_state import CacheState
from kvtoolkit.cache.tiering.places import Places
from kvtoolkit.errors import ArgumentError, UnsupportedError


class Hints:
    """The calls of a `kvtoolkit.KVCache` by which its engine says what it knows. None of them changes a result.

    An agent's session sleeps while a tool runs or its user reads. Only the engine knows when a pause begins, and often
    also when it ends. On a trace of agents `prefetch` in time kept 74 to 95 % of what perfect knowledge would gain, and
    guessed times 5 % at most; `offload` at every pause paid only where host memory had room for all that sleep
    (``docs/results/sessions.md``).
    """

    _calls: Calls
    _state: CacheState
    _places: Places | None

    @exclusive
    def offload(self, seq_ids: ArrayLike) -> int:
        """Say that sequences pause: what they hold moves to host memory, or is the first to go there.

        They stay open, and can be used like any others; a sequence wakes when it is in a step, or by `prefetch`. What
        other sequences that are awake hold too stays where it is, and so does a last block that is not full. The call
        returns at once: copies run beside the caller's kernels, and the memory becomes free when a later `begin_step`,
        `open` or hint finds them done, or at once when it is needed. A sequence that wakes before stays where it is.

        Args:
            seq_ids: ``[batch]`` open sequences.

        Returns:
            How many blocks of 64 tokens are on their way because of it; less than the sequences hold if host memory
            is full.

        Raises:
            SequenceError: an id is not that of an open sequence.
            UnsupportedError: the cache has no host memory; see ``host`` of `kvtoolkit.config.tiers.TierConfig`.
        """
        places = self._require_places("offload")
        return places.offload(self._state.rows_of(seq_ids, (OPEN,)))

    @exclusive
    def prefetch(self, seq_ids: ArrayLike) -> int:
        """Say that sequences will go on soon: what they hold in host memory moves to the device.

        For this, cached prefixes and what only sleeping sequences hold may leave the device. The call returns at once,
        as `offload` does. What is not there in time is read in place, which is slower and gives the same results.

        Args:
            seq_ids: ``[batch]`` open sequences, the most urgent first.

        Returns:
            How many blocks of 64 tokens are on their way because of it.

        Raises:
            SequenceError: an id is not that of an open sequence.
            UnsupportedError: the cache has no host memory.
        """
        places = self._require_places("prefetch")
        return places.prefetch(self._state.rows_of(seq_ids, (OPEN,)))

    @exclusive
    def retain(self, seq_ids: ArrayLike, seconds: float) -> None:
        """Say that what sequences leave behind when they are closed shall stay longer than what others do.

        What a sequence leaves cached then counts as used ``seconds`` later than it was. So it stays longer than what
        else is cached, but its lead melts away, and when memory is needed it goes like everything else. The clock of a
        cache counts calls, so seconds are turned into calls at the mean rate since the cache was made. Policies that
        look at something else than ``last_used`` do not see it. The call is also of use without host memory.

        It is for what is wanted soon: sessions that will be back within seconds. To retain each session for as long as
        its pause lasts keeps those longest that come back last, which is the worst order there is.

        Args:
            seq_ids: ``[batch]`` open sequences.
            seconds: from now on; 0 takes an earlier call back.

        Raises:
            SequenceError: an id is not that of an open sequence.
            ArgumentError: ``seconds`` is not a number from 0 to 10**9.
        """
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds <= 10**9:
            raise ArgumentError(f"seconds: expected a number from 0 to 10**9, got {seconds!r:.80}")
        self._state.retain(self._state.rows_of(seq_ids, (OPEN,)), float(seconds))

    def _require_places(self, what: str) -> Places:
        if self._places is None:
            raise UnsupportedError(
                f"{what}: expected a cache with host memory, got one without; give tiers={{'host': '64 GiB'}}"
            )
        return self._places
