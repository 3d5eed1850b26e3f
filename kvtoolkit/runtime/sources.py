"""Finds the device code: inside the package if it is installed, beside it in a checkout."""

from pathlib import Path


def source_folder() -> Path:
    """The folder ``cuda_src``; FileNotFoundError if the install lacks it."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "include" / "kvt").is_dir():
            return folder
    raise FileNotFoundError(f"cuda_src: expected it in {package} or beside it; reinstall kvtoolkit")


def get_include() -> Path:
    """The folder for ``-I``, so that kernels of your own can ``#include <kvt/entry.cuh>`` or ``<kvt/pool.cuh>``."""
    return source_folder() / "include"
