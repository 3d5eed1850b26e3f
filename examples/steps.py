"""Ways to run the steps of an engine: model and sampling as they are, or as one captured CUDA graph.

A captured step has a shape: so many rows and so many new tokens. Steps run in the smallest shape that they fit into;
the rows and tokens that are missing are padding, which costs next to nothing. Shapes are captured when they first come
up. Where every row has one new token, the graph may also grow the sequences, and run many times without the host.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from examples.few_rows import power_of_two
from examples.llama import PackedLlama
from examples.sampling import Choice, draw, likeliest
from kvtoolkit import DeviceSteps, DeviceTurn, GraphStep, KVCache, Step

MOST_AHEAD = 32
"""Tokens of each row that the device decodes at most while the host sleeps."""
_LEAST_TOKENS = 64  # of a captured step in which a row has several new tokens


class EagerSteps:
    """Runs the model as it is."""

    def __init__(self, model: PackedLlama) -> None:
        self.model = model

    def run(self, step: Step, tokens: np.ndarray, positions: np.ndarray, choice: Choice) -> np.ndarray:
        """The next token of each row.

        Args:
            step: open; rows that are not ok get a token that means nothing.
            tokens, positions: ``[num_tokens]`` int64, as `PackedLlama.forward` takes them.
            choice: of each row, on the host.
        """
        logits = self.model.forward(torch.from_numpy(tokens), torch.from_numpy(positions), step).cpu()
        return choose(logits, choice, kind_of(choice)).numpy()


class CapturedSteps:
    """Runs model and sampling as one CUDA graph; see `EagerSteps`.

    Args:
        model: on a GPU.
        cache: with backend ``"cuda"``.
        max_step_tokens: the most new tokens of a step.
    """

    def __init__(self, model: PackedLlama, cache: KVCache, max_step_tokens: int) -> None:
        self.model, self.cache, self.max_step_tokens = model, cache, max_step_tokens
        self.shapes: dict[tuple[int, int, str], CapturedStep] = {}
        self.loops: dict[tuple[int, str], DecodeLoop] = {}

    def run_ahead(
        self, seq_ids: list[int], tokens: list[int], max_lens: list[int], choice: Choice, num_steps: int, eos: int
    ) -> DeviceTurn:
        """Decode up to ``num_steps`` tokens of each row on the device alone.

        Args:
            tokens: the one that is next in each row.
            max_lens: tokens at which each row ends.
            eos: the token after which a row ends; -1 = none.
        """
        shape = power_of_two(len(seq_ids)), kind_of(choice)
        if shape not in self.loops:
            self.loops[shape] = DecodeLoop(self.model, self.cache, *shape)
        return self.loops[shape].run(seq_ids, tokens, max_lens, choice, num_steps, eos)

    def run(self, step: Step, tokens: np.ndarray, positions: np.ndarray, choice: Choice) -> np.ndarray:
        rows, each = power_of_two(len(step.seq_ids)), 0
        if len(tokens) > len(step.seq_ids):
            each = min(max(_LEAST_TOKENS, power_of_two(len(tokens))), self.max_step_tokens)
        shape = rows, each, kind_of(choice)
        if shape not in self.shapes:
            self.shapes[shape] = CapturedStep(self.model, self.cache, *shape)
        return self.shapes[shape].run(step, tokens, positions, choice)


class CapturedStep:
    """A graph for steps of up to ``rows`` rows and ``most`` new tokens, in any mixture; 0 = one in each row."""

    def __init__(self, model: PackedLlama, cache: KVCache, rows: int, most: int, kind: str) -> None:
        self.model, self.kind = model, kind
        num_tokens = most or rows
        self.fixed = GraphStep(cache, rows, most or 1, num_tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        sizes = [num_tokens, num_tokens, rows, rows, rows, rows]
        self.given = Given(sizes, model.device)
        self.chosen = torch.zeros(rows, dtype=torch.int64).pin_memory()

    def run(self, step: Step, tokens: np.ndarray, positions: np.ndarray, choice: Choice) -> np.ndarray:
        self.given.bring(tokens, positions, *words_of(choice))
        self.fixed.load(step)
        if self.graph is None:
            self.graph = capture(self.compute)
        self.graph.replay()
        torch.cuda.current_stream().synchronize()
        return self.chosen[: len(step.seq_ids)].numpy()

    @torch.inference_mode()
    def compute(self) -> None:
        tokens, positions, *words = self.given.parts
        logits = self.model.forward(tokens, positions, self.fixed.begin())
        self.chosen.copy_(choose(logits, choice_from(words), self.kind), non_blocking=True)


class DecodeLoop:
    """A graph for one token more in each of up to ``rows`` rows, whose replays need no host between them."""

    def __init__(self, model: PackedLlama, cache: KVCache, rows: int, kind: str) -> None:
        self.model, self.kind = model, kind
        self.steps = DeviceSteps(cache, rows, MOST_AHEAD)
        self.given = Given([rows] * 4 + [1], model.device)
        self.take = torch.compile(take, dynamic=True) if model.is_fused else take
        self.graph = capture(self.compute)  # without rows, of which each replay would take one token further

    def run(
        self, seq_ids: list[int], tokens: list[int], max_lens: list[int], choice: Choice, num_steps: int, eos: int
    ) -> DeviceTurn:
        self.given.bring(*words_of(choice), np.array([eos]))
        self.steps.load(seq_ids, tokens, num_steps, max_lens=max_lens)
        for _ in range(num_steps):
            self.graph.replay()
        return self.steps.finish()

    @torch.inference_mode()
    def compute(self) -> None:
        steps, (*words, eos) = self.steps, self.given.parts
        logits = self.model.forward(steps.tokens, steps.positions, steps.begin())
        chosen = choose(logits, choice_from(words), self.kind)
        self.take(chosen, steps.status, eos, steps.tokens, words[-1], steps.finished)


def take(
    chosen: torch.Tensor, status: torch.Tensor, eos: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor,
    finished: torch.Tensor,
) -> None:  # fmt: skip
    """Make the chosen tokens those of the next step, in rows that had one in this step."""
    is_ok = status == 0
    counts.add_(is_ok)
    finished.logical_or_(is_ok & (chosen == eos))
    tokens.copy_(torch.where(is_ok, chosen, tokens))


class Given:
    """Numbers that the host brings to a graph: pinned memory, and the places on the device where the graph reads."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.host = torch.zeros(sum(sizes), dtype=torch.int64).pin_memory()
        self.arrays = [part.numpy() for part in self.host.split(sizes)]
        self.there = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.parts = self.there.split(sizes)

    def bring(self, *arrays: np.ndarray) -> None:
        """Copy int64 arrays to their places, asynchronously; what they leave there becomes 0."""
        for part, array in zip(self.arrays, arrays, strict=True):
            part[: len(array)] = array
            part[len(array) :] = 0
        self.there.copy_(self.host, non_blocking=True)


def capture(compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run once, so that everything is compiled and has its memory, and capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        compute()
    return graph


def words_of(choice: Choice) -> list[np.ndarray]:
    """The numbers of a choice as int64, floats by their bits."""
    floats = [one.double().view(torch.int64).numpy() for one in choice[:2]]
    return [*floats, choice.seed.numpy(), choice.count.numpy()]


def choice_from(words: Sequence[torch.Tensor]) -> Choice:
    """The choice that has these words."""
    return Choice(*(one.view(torch.float64).float() for one in words[:2]), *words[2:])


def kind_of(choice: Choice) -> str:
    """What the rows of a step need at most: ``greedy``, ``drawn`` or ``nucleus``."""
    if not choice.temperature.any():
        return "greedy"
    return "nucleus" if (choice.top_p < 1).any() else "drawn"


def choose(logits: torch.Tensor, choice: Choice, kind: str) -> torch.Tensor:
    """The next token of each row."""
    return likeliest(logits) if kind == "greedy" else draw(logits, choice, kind == "nucleus")
