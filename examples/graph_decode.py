"""A whole decode step in one CUDA graph, replayed for every token: `python -m examples.graph_decode`.

The host makes room between replays (`begin_step`) and brings the tables to where the graph reads them
(`GraphStep.load`); lengths grow, blocks are added and merged, and the graph need not know. A small random model, since
what is shown is the host's time: the same tokens come out with and without the graph.
"""

import itertools
import sys
import time

import numpy as np
import torch
import transformers

from examples.llama import PackedLlama
from kvtoolkit import GraphStep, KVCache

BATCH, NUM_NEW = 8, 128


def make_model() -> PackedLlama:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,  # large weights: the likeliest token leads by more than rounding
    )
    return PackedLlama(transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval())


class Decoder:
    """Prompts that have been computed, ready to decode."""

    def __init__(self, model: PackedLlama) -> None:
        self.model = model
        self.cache = KVCache(model.cache_config(num_tokens=BATCH * 512, max_seqs=BATCH, max_seq_len=512))
        prompts = [[7 * row + i for i in range(20 + 9 * row)] for row in range(BATCH)]
        self.seq_ids, _ = self.cache.open(prompts)
        self.lengths = np.array([len(prompt) for prompt in prompts])
        with self.cache.begin_step(self.seq_ids, self.lengths) as step:
            positions = torch.cat([torch.arange(n) for n in self.lengths])
            logits = model.forward(torch.tensor(list(itertools.chain.from_iterable(prompts))), positions, step)
            self.cache.end_step(step)
        self.tokens = logits.argmax(-1)  # on the GPU: the host never needs to see them
        self.positions = torch.tensor(self.lengths, device="cuda")

    def eager(self) -> None:
        """One token for every sequence, kernel by kernel."""
        with self.cache.begin_step(self.seq_ids, 1) as step:
            self.tokens.copy_(self.model.forward(self.tokens, self.positions, step).argmax(-1))
            self.positions += 1
            self.cache.end_step(step)

    def capture(self) -> None:
        """Run one step with the fixed tables, then record it."""
        self.fixed = GraphStep(self.cache, BATCH)
        with self.cache.begin_step(self.seq_ids, 1) as step:
            self.fixed.load(step)
            next_tokens = self.model.forward(self.tokens, self.positions, self.fixed.begin()).argmax(-1)
            self.cache.end_step(step)
        self.tokens.copy_(next_tokens)
        self.positions += 1
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.tokens.copy_(self.model.forward(self.tokens, self.positions, self.fixed.begin()).argmax(-1))
            self.positions += 1

    def replay(self) -> None:
        """One token for every sequence, by the graph."""
        with self.cache.begin_step(self.seq_ids, 1) as step:
            self.fixed.load(step)
            self.graph.replay()
            self.cache.end_step(step)


def decode(step, decoder: Decoder, count: int) -> tuple[list[list[int]], float]:
    """The tokens, and milliseconds a step."""
    torch.cuda.synchronize()
    start, seen = time.perf_counter(), []
    for _ in range(count):
        step()
        seen.append(decoder.tokens.clone())
    torch.cuda.synchronize()
    return torch.stack(seen, 1).tolist(), (time.perf_counter() - start) / count * 1e3


def main() -> int:
    if not torch.cuda.is_available():
        print("graph_decode needs a CUDA device that torch can use, found none", file=sys.stderr)
        return 1
    model = make_model()
    plain, captured = Decoder(model), Decoder(model)
    plain.eager()
    captured.capture()
    expected, eager_ms = decode(plain.eager, plain, NUM_NEW)
    tokens, graph_ms = decode(captured.replay, captured, NUM_NEW)
    captured.cache.check_integrity()
    same = sum(a == b for one, other in zip(expected, tokens, strict=True) for a, b in zip(one, other, strict=True))
    print(f"{BATCH} sequences, {NUM_NEW} tokens: {eager_ms:.2f} ms a step eagerly, {graph_ms:.2f} ms by graph")
    print(f"{same} of {BATCH * NUM_NEW} tokens are the same")
    return int(same != BATCH * NUM_NEW)


if __name__ == "__main__":
    sys.exit(main())
