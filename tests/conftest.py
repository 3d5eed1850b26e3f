"""Settings that must come before anything is imported, and the skipping of GPU tests where there is no GPU."""

import os

import pytest

# the machines that run the tests have few cores, and torch's threads wait for each other by spinning
os.environ.setdefault("OMP_NUM_THREADS", "1")


def has_device() -> bool:
    """Whether CuPy and a CUDA device are here."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


def pytest_collection_modifyitems(items):
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not has_device():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
