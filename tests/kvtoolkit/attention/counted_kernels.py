"""A fixture that counts how often the CPU kernels are run."""

import pytest

from kvtoolkit import cpu
from kvtoolkit.backends import CpuBackend


@pytest.fixture
def counted(monkeypatch):
    """How often the CPU kernels were run in full, and as the layer before."""
    counts = {"in full": 0, "again": 0}

    def count(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return staticmethod(call)

    monkeypatch.setattr(CpuBackend, "attend", count("in full", cpu.attend))
    monkeypatch.setattr(CpuBackend, "attend_prepared", count("again", cpu.attend_prepared))
    return counts
