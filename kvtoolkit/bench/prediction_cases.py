"""What attention is recorded on: a text, facts in a filler and questions about them, and a walk over topics."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.bench.attention_recordings import Float32Array, Recording, record_arrays, record_model
from kvtoolkit.errors import ArgumentError
from kvtoolkit.formats.quantized import BLOCK as TILE

_COLOURS = ("red", "blue", "green", "black", "white", "brown", "yellow", "purple")
_THINGS = ("fox", "king", "river", "garden", "doctor", "train", "piano", "moon")
_DIGITS = 4
_TOKENS_A_QUESTION = 30  # at most; what is left over is filled up

NUM_TOPICS = 16
_STRENGTH = 5.7  # length of a topic's direction in queries and keys, beside noise of 1 in each of 64 channels
_THETA = 100_000.0  # that of SmolLM2


def read_text(path: str | None) -> str:
    """A file, or without one the topics that come with Python's ``pydoc``; ArgumentError if it cannot be read."""
    if path is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--text: {path} cannot be read: {error}") from error


def encode(tokenizer: Any, text: str, num_tokens: int) -> list[int]:
    """The first tokens of a text; ArgumentError if it has fewer."""
    ids: list[int] = tokenizer(text[: 16 * num_tokens])["input_ids"]
    if len(ids) < num_tokens:
        raise ArgumentError(f"--text: expected a text of at least {num_tokens} tokens, got {len(ids)}")
    return ids[:num_tokens]


def record_text(model: Any, ids: list[int], num_steps: int, name: str) -> Recording:
    """Ordinary text. Its first quarter counts as the prompt, as if the model had written the rest."""
    recording, likeliest = record_model(model, ids, num_steps, name, num_prompt_tiles=len(ids) // 4 // TILE)
    right = float((likeliest[:-1] == np.array(ids[-num_steps:])[1:]).mean())
    return replace(recording, remarks=f"the likeliest next token is that of the text {right:.0%} of the time")


# -- needles -----------------------------------------------------------------------------------------------------------


def needle_tokens(
    tokenizer: Any, filler: list[int], num_tokens: int, num_steps: int, seed: int = 0
) -> tuple[list[int], NDArray[np.int64], int]:
    """A document with facts, more filler, and questions in another order, each with its right answer.

    Args:
        tokenizer: called with a text; gives ``input_ids``.
        filler: at least ``num_tokens`` tokens.
        num_tokens: of everything.
        num_steps: tokens at the end that hold the questions.
        seed: of the numbers and of the order.

    Returns:
        ``ids`` with ``num_tokens`` tokens; ``[num_tokens]`` int64, at each digit of an answer the position of the same
        digit in the document, else -1; and the length of the document, five eighths of what comes before the questions.
    """
    draw = np.random.default_rng(seed)
    names = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    num_facts = min(len(names), num_steps // _TOKENS_A_QUESTION)
    names = draw.permutation(names)[:num_facts].tolist()
    numbers = ["".join(map(str, draw.integers(0, 10, _DIGITS))) for _ in names]

    # the last digit is the last token of the first part
    facts = [
        tokenizer(f"\n\nRemember: the number of the {name} is {number}")["input_ids"]
        for name, number in zip(names, numbers, strict=True)
    ]
    end_of_fact = tokenizer(".\n\n")["input_ids"]
    before = num_tokens - num_steps
    num_document = before * 5 // 8
    left = num_document - sum(map(len, facts)) - num_facts * len(end_of_fact)
    if left < 0:
        raise ArgumentError(f"--tokens: expected more for {num_facts} facts, got {num_tokens}")
    ids: list[int] = []
    ends = []
    for i, fact in enumerate(facts):
        ids += filler[left * i // num_facts : left * (i + 1) // num_facts] + fact
        ends.append(len(ids))
        ids += end_of_fact
    sources = [-1] * before
    questions: list[int] = []
    for i in draw.permutation(num_facts).tolist():
        asked = tokenizer(f"\nWhat is the number of the {names[i]}? The number of the {names[i]} is")["input_ids"]
        answer = tokenizer(f" {numbers[i]}")["input_ids"]
        questions += asked + answer
        sources += [-1] * (len(asked) + len(answer) - _DIGITS) + list(range(ends[i] - _DIGITS, ends[i]))
    questions = questions[:num_steps]
    padding = num_steps - len(questions)
    ids += filler[left : left + before - len(ids)] + questions + filler[:padding]
    return ids, np.array(sources[: num_tokens - padding] + [-1] * padding), num_document


def record_needles(model: Any, tokenizer: Any, filler: list[int], num_tokens: int, num_steps: int) -> Recording:
    """Many facts in a filler, then questions about them one by one. The document with the facts is the prompt."""
    ids, sources, num_document = needle_tokens(tokenizer, filler, num_tokens, num_steps)
    recording, likeliest = record_model(model, ids, num_steps, "needles", num_prompt_tiles=num_document // TILE)
    # a step's query decides on the token after its own
    following, sources = np.array(ids)[-num_steps:][1:], sources[-num_steps:][1:]
    right = float((likeliest[:-1] == following)[sources >= 0].mean())
    num_facts = int((sources >= 0).sum()) // _DIGITS
    remarks = f"{num_facts} facts in {num_document} tokens; {right:.0%} of the answers' digits are the likeliest token"
    return replace(recording, remarks=remarks, wanted=np.append(np.where(sources >= 0, sources // TILE, -1), -1))


# -- a walk over topics ------------------------------------------------------------------------------------------------


def rotate(x: Float32Array, positions: NDArray[np.int64]) -> Float32Array:
    """RoPE in halves, as Llama has it. ``x``: ``[..., num_positions, head_dim]``; source: Su et al. 2021, RoFormer."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * _THETA ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def walk(draw: np.random.Generator, length: int, stay: float) -> NDArray[np.int64]:
    """``[length]`` topics of a Markov walk, which stays with probability ``stay`` and else takes another topic."""
    moves = (draw.random(length) >= stay) * draw.integers(1, NUM_TOPICS, length)
    return np.cumsum(moves) % NUM_TOPICS


def record_walk(
    stay: float, num_tokens: int, num_steps: int, *, strength: float = _STRENGTH, seed: int = 0
) -> Recording:
    """Keys in clusters by topic, and queries that walk over the topics.

    The tokens come in runs of one topic, 50 long in the mean. A key is its topic's direction and noise, and a query is
    the same with the topic of the walk; both are rotated by RoPE. Each head has directions of its own. They have only
    channels that RoPE turns by less than one radian over the context, because with the others a topic's score would
    depend on the distance.

    Args:
        stay: probability that the next query has the topic of the last.
        strength: length of the directions; with 0 keys and queries are noise.
        seed: of everything.
    """
    num_layers, num_kv_heads, group_size, head_dim = 2, 4, 3, 64
    draw = np.random.default_rng(seed)
    half = head_dim // 2
    slow = np.flatnonzero(num_tokens * _THETA ** (-np.arange(half) / half) < 1)
    directions = np.zeros((num_layers, num_kv_heads, NUM_TOPICS, head_dim), np.float32)
    channels = np.concatenate([slow, slow + half])
    directions[..., channels] = draw.normal(size=(*directions.shape[:3], len(channels)))
    directions *= strength / np.linalg.norm(directions, axis=-1, keepdims=True)

    topics, asked = walk(draw, num_tokens, 0.98), walk(draw, num_steps, stay)
    key: Float32Array = directions[:, :, topics]
    key += draw.standard_normal(key.shape, np.float32)
    query: Float32Array = np.repeat(directions[:, :, None, asked], group_size, 2)
    query += draw.standard_normal(query.shape, np.float32)
    key, query = rotate(key, np.arange(num_tokens)), rotate(query, np.arange(num_tokens - num_steps, num_tokens))

    before = num_tokens - num_steps
    scores = np.einsum("lhsd,lhtd->lhst", query[:, :, 0, ::8], key[:, :, :before]) * head_dim**-0.5
    same = np.broadcast_to(asked[::8, None] == topics[:before], scores.shape)
    contrast = (scores[same].mean() - scores[~same].mean()) / scores[~same].std()
    return record_arrays(
        f"walk, stay {stay:g}", query, key, num_prompt_tiles=num_tokens // 4 // TILE,
        remarks=f"contrast {contrast:.2f}: scores of the query's topic over the others, in their standard deviations",
    )  # fmt: skip
