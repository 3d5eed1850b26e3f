"""A padded batch, as frameworks with rectangular tensors have it, on the sequences of a `KVCache`.

columns              positions of the rectangle: what the framework calls the sequence length
present[b, c]        whether column c of row b holds a token; the others are padding and take no memory
lengths(row b)       == present[b].sum()
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import ArrayLike
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.state.arguments import as_prompt
from kvtoolkit.cache.state.identity import as_pairs, as_salts
from kvtoolkit.cache.step import Step
from kvtoolkit.errors import ArgumentError, CacheFullError, ShapeError, StepError

BoolArray = NDArray[np.bool_]


class PaddedBatch:
    """The rows of one padded batch, and the step that a forward of the model is in.

    A forward is `begin`, every layer through `step`, `end`. One that never came to its end, because something raised,
    is forgotten by whatever is called next. A batch whose last reference goes closes its rows. Not thread-safe; several
    batches may share one `KVCache`.

    Attributes:
        cache: the `KVCache`.
        device: CUDA ordinal of its memory; -1 = host.
        seq_ids: ``[batch]`` int64, or None before the first forward.
        num_columns: columns cached.
        step: the open step, or None.
        next_layer: layers that the forward has been through.
        spans: of each layer: the window that the cache keeps, minus its chunk, or 0 = all tokens.
        form: what the arrays and options of the last layer looked like; for the integration to keep.
        packed: ``[num_tokens]`` int64, where the step's tokens are among its ``batch * columns``; None = all do.
        places: `packed` as the framework indexes with it; for the integration to keep.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.device = cache._arenas.device
        groups = cache.config.groups
        self.spans = [span for _, span in sorted((layer, group.span) for group in groups for layer in group.layers)]
        self.seq_ids: NDArray[np.int64] | None = None
        self.num_columns = 0
        self.step: Step | None = None
        self.next_layer = 0
        self.form: object = None
        self.packed: NDArray[np.int64] | None = None
        self.places: Any = None
        self._present: BoolArray | None = None  # [batch, num_columns]; None: no padding so far
        self._new_columns = 0
        self._new_present: BoolArray | None = None
        self._gap: int | None = 0  # see `gap`; None: not looked at yet
        self._prompt: tuple[NDArray[np.int64], BoolArray] | None = None  # what `open` was told, to be published

    def __del__(self) -> None:
        seq_ids = getattr(self, "seq_ids", None)
        if seq_ids is not None:  # nobody else has these ids
            self.cache._close_later(seq_ids)

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first forward."""
        return 0 if self.seq_ids is None else len(self.seq_ids)

    # -- forwards ----------------------------------------------------------------------------------------------------

    def open(
        self, tokens: ArrayLike, mask: ArrayLike | None = None, *, salt: Any = None, extra_keys: Any = None
    ) -> int:
        """Begin with prompts, of which as much as is cached already need not be computed again.

        Args:
            tokens: ``[batch, columns]`` integers, padded on the left.
            mask: ``[batch, columns]``, 0 where there is padding.
            salt: as `KVCache.open` takes it.
            extra_keys: as `KVCache.open` takes them, with columns for positions; those of padding are refused.

        Returns:
            Columns that are cached, fewer than ``columns``. The forwards to come must be of the rest of these tokens.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype.kind not in "iu":
            raise ShapeError(f"tokens: expected [batch, columns] integers, got {ids.dtype} {list(ids.shape)}")
        present = np.ones(ids.shape, np.bool_) if mask is None else np.asarray(mask).astype(np.bool_)
        if present.shape != ids.shape or (np.diff(present.astype(np.int8), axis=1) < 0).any():
            raise ShapeError(f"mask: expected {list(ids.shape)}, padding on the left only, got {list(present.shape)}")
        pads = ids.shape[1] - present.sum(1)
        as_salts(salt, len(ids))  # before anything is closed
        extras = as_pairs(extra_keys, len(ids))
        for i, pairs in enumerate(extras):
            if any(position < pads[i] for position, _ in pairs):
                raise ShapeError(f"extra_keys[{i}]: expected columns from {pads[i]} on, got one that is padding")
        shifted = [[(position - int(pads[i]), key) for position, key in pairs] for i, pairs in enumerate(extras)]
        prompts = [as_prompt(row[here], i) for i, (row, here) in enumerate(zip(ids, present, strict=True))]
        self.reset()
        self.seq_ids, cached_lens = self.cache.open(prompts, salt=salt, extra_keys=shifted)
        columns = int(min((pads + cached_lens).min(initial=ids.shape[1] - 1), ids.shape[1] - 1))
        keep = np.maximum(columns - pads, 0)
        try:
            try:
                self.cache.truncate(self.seq_ids, keep)
            except ArgumentError:  # layers with a window found only the end of a row's prefix, which is longer
                columns = 0
                self.cache.truncate(self.seq_ids, np.zeros_like(keep))
        except CacheFullError:
            self.reset()
            raise
        self.num_columns = columns
        self._present = None if present[:, :columns].all() else present[:, :columns].copy()
        self._prompt = (ids.astype(np.int64), present)
        return columns

    def begin(self, batch_size: int, columns: int, mask: BoolArray | None = None) -> Step:
        """Make room for the next columns.

        Args:
            batch_size: rows; what earlier forwards had.
            columns: new ones.
            mask: ``[batch, num_columns + columns]`` bool, False at padding; None = no padding among the new.

        Raises:
            CacheFullError: a row got no memory; the batch is as it was before.
            ShapeError: ``batch_size`` or ``mask`` does not fit what is cached.
        """
        self._forget_step()
        if self.num_columns == 0 and self.batch_size != batch_size:
            self.reset()  # rows of a first forward that failed
        if self.seq_ids is None:
            self.seq_ids, _ = self.cache.open([()] * batch_size)
        if len(self.seq_ids) != batch_size:
            raise ShapeError(f"expected a batch of {len(self.seq_ids)} rows as before, got {batch_size}; call reset()")
        new = None if mask is None else self._split_mask(mask, columns)
        if new is not None and new.all():
            new = None
        step = self.cache.begin_step(self.seq_ids, columns if new is None else new.sum(1))
        if not step.ok.all():
            reasons = step.explain()
            self.cache.abort_step(step)
            if self.num_columns == 0:
                self.reset()  # the blocks that other rows were granted
            pieces = "feed prompts in pieces (prefill_chunk_size), " if any(self.spans) else ""
            raise CacheFullError(
                f"no room for {columns} more tokens in {len(reasons)} of {batch_size} rows "
                f"({'; '.join(reasons[:4])}{'; ...' if len(reasons) > 4 else ''}) of a pool of "
                f"{self.cache.stats().capacity} slots: give the cache more num_tokens, {pieces}batch fewer prompts, "
                "generate fewer tokens, or close what else shares the pool"
            )
        self.step, self.next_layer = step, 0
        self.packed = None if new is None else np.flatnonzero(new)
        self._new_columns, self._new_present = columns, new
        self._gap = 0 if mask is None else None
        return step

    def gap(self, mask: BoolArray) -> int:
        """The most columns from the first to the last token of a row with padding between tokens; 0: there is none.

        Args:
            mask: what the open forward began with.
        """
        if self._gap is None:
            count, columns = mask.sum(1), mask.shape[1]
            stretch = np.where(count > 0, columns - mask.argmax(1) - mask[:, ::-1].argmax(1), 0)
            self._gap = int(stretch[stretch > count].max(initial=0))
        return self._gap

    def end(self) -> None:
        """All layers are done: the new columns count."""
        if self.step is None:
            raise StepError("expected a forward that has begun")
        start, stop = self.num_columns, self.num_columns + self._new_columns
        tokens = None
        if self._prompt is not None and stop <= self._prompt[0].shape[1]:
            ids, present = self._prompt
            if self._new_present is None or (self._new_present == present[:, start:stop]).all():
                tokens = ids[:, start:stop][present[:, start:stop]]
                if len(tokens) != len(self.step.slot_mapping):
                    tokens = None
        self.cache.end_step(self.step, tokens)
        self.step = None
        if self._present is not None or self._new_present is not None:
            self._present = self._joined(self._present, start, self._new_present, self._new_columns)
        self.num_columns = stop

    def _joined(self, old: BoolArray | None, num_old: int, new: BoolArray | None, num_new: int) -> BoolArray:
        joined = np.ones((self.batch_size, num_old + num_new), np.bool_)
        if old is not None:
            joined[:, :num_old] = old
        if new is not None:
            joined[:, num_old:] = new
        return joined

    def _split_mask(self, mask: BoolArray, columns: int) -> BoolArray:
        """The mask of the new columns; that of the others must say what is cached."""
        expected = (self.batch_size, self.num_columns + columns)
        if mask.shape != expected:
            raise ShapeError(f"attention_mask: expected [batch, cached + new] = {expected}, got {mask.shape}")
        old = mask[:, : self.num_columns]
        if not (old.all() if self._present is None else np.array_equal(old, self._present)):
            raise ShapeError("attention_mask: expected the cached columns masked as when they were computed")
        return mask[:, self.num_columns :]

    def _forget_step(self) -> None:
        if self.step is not None:
            self.cache.abort_step(self.step)
            self.step = None

    # -- rows and columns --------------------------------------------------------------------------------------------

    def truncate(self, num_columns: int) -> None:
        """Forget the last ``num_columns`` columns; all of them if there are no more.

        Raises:
            ArgumentError: layers with a window have let go of what the next columns would see; nothing was forgotten.
            CacheFullError: no block for a copy; nothing was forgotten.
        """
        self._forget_step()
        keep = max(0, self.num_columns - num_columns)
        if self.seq_ids is None or keep == self.num_columns:
            return
        present = None if self._present is None else self._present[:, :keep]
        self.cache.truncate(self.seq_ids, np.full(self.batch_size, keep) if present is None else present.sum(1))
        self._present, self.num_columns = present, keep
        self._prompt = None  # other tokens may follow

    def reorder(self, parents: NDArray[np.int64]) -> None:
        """Row ``i`` continues what row ``parents[i]`` holds."""
        self._forget_step()
        if self.seq_ids is None:
            return
        self.cache.reorder(self.seq_ids, parents)
        self._map_rows(parents)

    def select(self, rows: NDArray[np.int64]) -> None:
        """Keep the rows named, in that order; one named twice is copied, the others are closed.

        Raises:
            CacheFullError: too few rows or blocks for the copies; nothing was changed.
        """
        self._forget_step()
        if self.seq_ids is None:
            return
        seq_ids = np.full(len(rows), -1, np.int64)
        try:
            for row, count in zip(*np.unique(rows, return_counts=True), strict=True):
                places = np.flatnonzero(rows == row)
                seq_ids[places[1:]] = self.cache.fork(self.seq_ids[[row]], int(count) - 1)[0]
                seq_ids[places[0]] = self.seq_ids[row]
        except CacheFullError:
            self.cache.close(np.setdiff1d(seq_ids[seq_ids >= 0], self.seq_ids))
            raise
        self.cache.close(np.setdiff1d(self.seq_ids, seq_ids))
        self.seq_ids = seq_ids
        self._map_rows(rows)

    def fork_from(self, other: "PaddedBatch") -> None:
        """Become a fork of another batch in the same `KVCache`: its rows as of now, their memory shared.

        What an open forward of ``other`` has appended is not in it.

        Raises:
            CacheFullError: too few rows or blocks; nothing was changed.
        """
        self.reset()
        if other.seq_ids is None:
            return
        self.seq_ids = np.asarray(self.cache.fork(other.seq_ids, 1)).reshape(-1)
        self.num_columns, self._present, self._prompt = other.num_columns, other._present, other._prompt

    def _map_rows(self, rows: NDArray[np.int64]) -> None:
        if self._present is not None:
            self._present = self._present[rows]
        if self._prompt is not None:
            self._prompt = (self._prompt[0][rows], self._prompt[1][rows])

    def reset(self) -> None:
        """Close all rows: the next forward begins a new batch, of any size."""
        self._forget_step()
        if self.seq_ids is not None:
            self.cache.close(self.seq_ids)
        self.seq_ids, self.num_columns, self.packed = None, 0, None
        self._present = self._prompt = None
