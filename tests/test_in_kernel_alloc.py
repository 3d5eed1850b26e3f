"""The example of blocks taken inside kernels: it compiles everywhere, and on a GPU nothing is lost or shared."""

import pytest

from examples import in_kernel_alloc
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
        cubin, _ = toolchain.compile_source(in_kernel_alloc.SOURCE, "in_kernel_alloc.cu", {}, options)
        assert cubin


def test_without_a_device_it_says_what_it_needs(monkeypatch, capsys):
    def refuse(config):
        raise UnsupportedError("backend: 'cuda' needs CuPy and a CUDA device")

    monkeypatch.setattr(in_kernel_alloc, "KVCache", refuse)
    assert in_kernel_alloc.main() == 1
    assert "in_kernel_alloc needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_kernels_take_blocks_of_a_live_cache_and_give_them_back(capsys):
    assert in_kernel_alloc.main() == 0
    out = capsys.readouterr().out
    assert "34 kept" in out
    assert "0 refused" in out
