"""Processes that keep every core busy, to see what an engine needs of the CPU."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """A process for each core that never rests."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    time.sleep(2)  # until they spin
    try:
        yield
    finally:
        for process in processes:
            process.terminate()


def _spin() -> None:
    while True:
        pass
