"""Speculative decoding without a second model: `python -m examples.speculative --help`.

Each step feeds a sequence its next token and 7 drafts: what came after the last place where its latest two tokens
stood before. The model checks all 8 at once. Those before the first wrong one stay, and what the model says there is
the next token. So the tokens are those of plain decoding, but for rounding, and steps are fewer where a text repeats
itself (Saxena 2023, prompt lookup decoding; Leviathan et al. 2022, arXiv:2211.17192, for the check). On a GPU drafting,
checking and rejecting are part of one captured graph, which grows the sequences, too. On a CPU the host makes room, and
truncates.
"""

import sys
import time

import numpy as np
import torch
import transformers

from allocators._command_line import Parser, integer
from examples.llama import PackedLlama
from examples.steps import capture
from kvtoolkit import DeviceSteps, KVCache

EACH = 8  # tokens of a row in a step, of which all but the first are drafts
TURN = 16  # steps between two looks of the host


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m examples.speculative", description=__doc__)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=integer(1), default=4, help="sequences")
    parser.add_argument("--max-new-tokens", type=integer(1, 100_000), default=128, help="of each; default 128")
    options = parser.parse_args(arguments)
    if options.backend == "cuda" and not torch.cuda.is_available():
        print("speculative: expected a CUDA device that torch can use, found none", file=sys.stderr)
        return 2
    model = make_model(options.backend)
    prompts = [[(7 * row + 3 * i) % 50 for i in range(20 + 9 * row)] for row in range(options.batch)]
    plain, plain_seconds, _ = generate(model, prompts, options.max_new_tokens, 1)
    drafted, seconds, num_steps = generate(model, prompts, options.max_new_tokens, EACH)
    same = sum(one == other for one, other in zip(plain, drafted, strict=True))
    print(
        f"{options.batch} sequences of {options.max_new_tokens} tokens: {num_steps} steps with {EACH - 1} drafts each"
    )
    print(f"{plain_seconds * 1e3:.0f} ms one by one, {seconds * 1e3:.0f} ms with drafts")
    print(f"{same} of {len(plain)} texts are equal")
    return 0


def make_model(backend: str) -> PackedLlama:
    """A small model with drawn weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.02,  # texts that repeat themselves
    )  # fmt: skip
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    return PackedLlama(transformers.LlamaForCausalLM(config).to(backend, dtype).eval())


def generate(
    model: PackedLlama, prompts: list[list[int]], max_new_tokens: int, each: int
) -> tuple[list[list[int]], float, int]:
    """The likeliest next tokens of each prompt, the seconds it took after the prompts, and the number of steps."""
    batch, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
    most = int(lengths.max()) + max_new_tokens + each
    cache = KVCache(model.cache_config(num_tokens=batch * (most + 64), max_seqs=batch, max_seq_len=most))
    seq_ids, held = cache.open(prompts)
    with cache.begin_step(seq_ids, lengths - held) as step:
        tokens = [token for prompt, n in zip(prompts, held, strict=True) for token in prompt[n:]]
        positions = np.concatenate([np.arange(n, length) for n, length in zip(held, lengths, strict=True)])
        logits = model.forward(torch.tensor(tokens), torch.from_numpy(positions), step)
        cache.end_step(step, tokens)
    text = Text(prompts, logits.argmax(-1), most + each)
    loop = OnDevice(model, cache, text, each) if model.device.type == "cuda" else OnHost(model, cache, text, each)
    begin, num_steps = time.perf_counter(), 0
    while int((text.ends.cpu() - torch.from_numpy(lengths)).min()) < max_new_tokens:
        num_steps += loop.run(seq_ids, lengths + max_new_tokens)
    seconds = time.perf_counter() - begin
    rows = text.tokens.cpu().tolist()
    return [row[n : n + max_new_tokens] for row, n in zip(rows, lengths.tolist(), strict=True)], seconds, num_steps


class Text:
    """What each sequence says so far, its next token included, where the model is.

    Attributes:
        tokens: ``[batch, most]`` int64; -1 beyond the end.
        ends: ``[batch]`` int64.
    """

    def __init__(self, prompts: list[list[int]], first: torch.Tensor, most: int) -> None:
        self.tokens = torch.full((len(prompts), most), -1, device=first.device)
        self.ends = torch.tensor([len(prompt) + 1 for prompt in prompts], device=first.device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=first.device)
        self.tokens.scatter_(1, self.ends[:, None] - 1, first[:, None])

    def draft(self, each: int) -> torch.Tensor:
        """``[batch, each]`` the next token of each row, and guesses of those after it."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        last, before = (self.tokens.gather(1, (self.ends - i)[:, None]) for i in (1, 2))
        stood = (
            (self.tokens == last)
            & (self.tokens.roll(1, 1) == before)
            & (places < self.ends[:, None] - 1)
            & (places > 0)
        )
        latest = torch.where(stood, places, -1).amax(1)  # -1: nowhere, so the beginning of the text is the guess
        guesses = self.tokens.gather(1, latest[:, None] + torch.arange(1, each, device=last.device))
        return torch.cat((last, guesses.clamp(min=0)), 1)  # beyond the end there is nothing to guess from

    def take(self, fed: torch.Tensor, best: torch.Tensor, is_ok: torch.Tensor) -> torch.Tensor:
        """Append what stays of ``fed`` ``[batch, each]``, and the model's own next token.

        Args:
            best: ``[batch, each]`` what the model says after each of them.
            is_ok: ``[batch]`` which rows were fed at all.

        Returns:
            ``[batch]`` how many of ``fed`` stay.
        """
        kept = 1 + (best[:, :-1] == fed[:, 1:]).long().cumprod(1).sum(1)
        kept = torch.where(is_ok, kept, 0)
        places = self.ends[:, None] + torch.arange(best.shape[1], device=best.device)
        is_new = places < (self.ends + kept)[:, None]  # accepted drafts are what the model has said, too
        places = places.clamp(max=self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, places, torch.where(is_new, best, self.tokens.gather(1, places)))
        self.ends += kept
        return kept


class OnDevice:
    """Drafting, checking and growing in one captured graph."""

    def __init__(self, model: PackedLlama, cache: KVCache, text: Text, each: int) -> None:
        self.model, self.text, self.each = model, text, each
        self.steps = DeviceSteps(cache, len(text.ends), TURN, num_new_tokens=each)
        self.graph = capture(self.compute)

    @torch.inference_mode()
    def compute(self) -> None:
        steps, each = self.steps, self.each
        fed = self.text.draft(each)
        steps.tokens.copy_(fed.view(-1))
        run = steps.begin()
        best = self.model.forward(steps.tokens, steps.positions, run, every=True).argmax(-1).view(-1, each)
        kept = self.text.take(fed, best, steps.status == 0)
        if each > 1:
            steps.kept.copy_(kept)

    def run(self, seq_ids: np.ndarray, max_lens: np.ndarray) -> int:
        """Some steps; returns how many."""
        first = self.text.tokens.gather(1, self.text.ends[:, None] - 1)[:, 0]
        self.steps.load(seq_ids, first.cpu().numpy(), max_lens=max_lens + self.each)
        for _ in range(TURN):
            self.graph.replay()
        self.steps.finish()
        return TURN


class OnHost:
    """The same steps, for each of which the host makes room, and truncates what is rejected."""

    def __init__(self, model: PackedLlama, cache: KVCache, text: Text, each: int) -> None:
        self.model, self.cache, self.text, self.each = model, cache, text, each

    @torch.inference_mode()
    def run(self, seq_ids: np.ndarray, max_lens: np.ndarray) -> int:
        """One step; returns 1."""
        held = self.cache.lengths(seq_ids).astype(np.int64)
        fed = self.text.draft(self.each)
        with self.cache.begin_step(seq_ids, self.each) as step:  # rows that are at their end are not ok
            positions = torch.from_numpy((held[:, None] + np.arange(self.each)).ravel())
            logits = self.model.forward(fed.view(-1), positions, step, every=True)
            is_ok = torch.from_numpy(step.ok.copy())
            self.cache.end_step(step, fed.view(-1).numpy())
        kept = self.text.take(fed, logits.argmax(-1).view(-1, self.each), is_ok)
        self.cache.truncate(seq_ids, held + kept.numpy())
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
