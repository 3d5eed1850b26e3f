"""The stream of requests of the examples, on the CPU."""

import gzip
import multiprocessing
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from examples import busy, stream
from examples.llama import PackedLlama

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,20,9
2023-11-16 18:17:05.9799600,2000,7
2023-11-16 18:17:07.9799600,100,0
2023-11-16 18:17:08.9799600,100,3
"""


def test_a_trace_is_scaled_to_a_rate(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(TRACE.encode()))
    found = stream.read_trace(path, SimpleNamespace(requests=3, rate=1.5))
    assert [one[1:] for one in found] == [(374, 44), (2000, 7), (100, 3)]
    assert [one.seconds for one in found] == pytest.approx([0, 0.8, 2])
    path = tmp_path / "empty.csv"
    path.write_text(TRACE.splitlines()[0])
    with pytest.raises(ValueError, match="found none"):
        stream.read_trace(path, SimpleNamespace(requests=3, rate=1.5))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected columns ContextTokens"):
        stream.read_trace(path, SimpleNamespace(requests=3, rate=1.5))


def test_every_request_of_a_stream_gets_its_answer():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = PackedLlama(transformers.LlamaForCausalLM(config).eval())
    arrivals = stream.draw(SimpleNamespace(requests=6, rate=200.0))
    arrivals = [one._replace(prompt=one.prompt // 20, answer=1 + one.answer // 20) for one in arrivals]
    engine = stream.make_engine(model, arrivals, 3, 1)
    seen = stream.run(engine, arrivals)
    assert len(seen.first) == len(arrivals)
    assert seen.num_tokens == sum(one.answer for one in arrivals)
    assert min(seen.first) > 0
    assert len(seen.columns()) == 7
    assert engine.cache.stats().num_seqs == 0


def test_busy_cores_end():
    with busy.busy_cores():
        assert multiprocessing.active_children()
    assert not [child for child in multiprocessing.active_children() if child.join(5) or child.is_alive()]
