"""Ways to run one step of an engine: model and sampling as they are, or as one captured CUDA graph.

A captured step has a shape: so many rows and so many new tokens. Steps run in the smallest shape that they fit into;
the rows and tokens that are missing are padding, which costs next to nothing. Shapes are captured when they first come
up.
"""

import numpy as np
import torch

from examples.llama import PackedLlama
from examples.sampling import Choice, draw, likeliest
from kvtoolkit import GraphStep, KVCache, Step

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
        self.host = torch.zeros(sum(sizes), dtype=torch.int64).pin_memory()
        self.given = [part.numpy() for part in self.host.split(sizes)]
        self.there = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device)
        self.parts = self.there.split(sizes)
        self.chosen = torch.zeros(rows, dtype=torch.int64).pin_memory()

    def run(self, step: Step, tokens: np.ndarray, positions: np.ndarray, choice: Choice) -> np.ndarray:
        floats = [one.double().view(torch.int64).numpy() for one in choice[:2]]
        arrays = (tokens, positions, *floats, choice.seed.numpy(), choice.count.numpy())
        for part, array in zip(self.given, arrays, strict=True):
            part[: len(array)] = array
            part[len(array) :] = 0
        self.there.copy_(self.host, non_blocking=True)
        self.fixed.load(step)
        if self.graph is None:
            self.capture()
        self.graph.replay()
        torch.cuda.current_stream().synchronize()
        return self.chosen[: len(step.seq_ids)].numpy()

    def capture(self) -> None:
        """Run once, so that everything is compiled and has its memory, and capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.compute()

    @torch.inference_mode()
    def compute(self) -> None:
        tokens, positions, temperature, top_p, seed, count = self.parts
        choice = Choice(*(one.view(torch.float64).float() for one in (temperature, top_p)), seed, count)
        logits = self.model.forward(tokens, positions, self.fixed.begin())
        self.chosen.copy_(choose(logits, choice, self.kind), non_blocking=True)


def kind_of(choice: Choice) -> str:
    """What the rows of a step need at most: ``greedy``, ``drawn`` or ``nucleus``."""
    if not choice.temperature.any():
        return "greedy"
    return "nucleus" if (choice.top_p < 1).any() else "drawn"


def choose(logits: torch.Tensor, choice: Choice, kind: str) -> torch.Tensor:
    """The next token of each row."""
    return likeliest(logits) if kind == "greedy" else draw(logits, choice, kind == "nucleus")


def power_of_two(n: int) -> int:
    """The smallest one that is not below ``n``."""
    return 1 << (n - 1).bit_length()
