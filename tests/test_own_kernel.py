"""The example of a kernel of one's own: it compiles everywhere, and on a GPU it finds what NumPy finds."""

import pytest

from examples import own_kernel
from kvtoolkit import UnsupportedError, get_include
from kvtoolkit.cuda import specs
from kvtoolkit.runtime import toolchain


def test_it_compiles_with_our_header_alone():
    try:
        toolchain.nvrtc()
    except UnsupportedError as error:
        pytest.skip(str(error))
    for arch in specs.SMEM_LIMITS:
        options = ("-std=c++17", f"-I{get_include()}", f"-arch=sm_{arch}")
        cubin, _ = toolchain.compile_source(own_kernel.SOURCE, "own_kernel.cu", {}, options)
        assert cubin


def test_without_a_device_it_says_what_it_needs(monkeypatch, capsys):
    def refuse(config):
        raise UnsupportedError("backend: 'cuda' needs CuPy and a CUDA device")

    monkeypatch.setattr(own_kernel, "KVCache", refuse)
    assert own_kernel.main() == 1
    assert "own_kernel needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_reads_a_live_cache_through_its_block_table(capsys):
    assert own_kernel.main() == 0
    assert "700 tokens in blocks of [64," in capsys.readouterr().out
