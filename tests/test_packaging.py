"""What is installed is whole: wheel and sdist, imports without extras, a read-only install."""

import configparser
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# With nothing installed but numpy and numba: an allocator, and a round through allocator, cache and kernels.
IMPORTS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cupy", "hypothesis", "transformers", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, allocators, kvtoolkit
assert kvtoolkit.BlockAllocator is allocators.BlockAllocator
assert (kvtoolkit.get_include() / "kvt" / "entry.cuh").is_file()
print(kvtoolkit.__file__)
"""
ALLOCATOR = """
assert len(set(allocators.PagedAllocator(16).allocate([2, 2]).tolist())) == 2
print(allocators._jit.cache_folder())
"""
CACHE = """
config = kvtoolkit.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=32, dtype="float32", num_tokens=64)
cache = kvtoolkit.KVCache(config)
ids, _ = cache.open([[1, 2, 3]])
step = cache.begin_step(ids, 3)
x = np.ones((3, 1, 32), np.float32)
step.append(0, x, x)
assert np.allclose(step.attend(0, x), 1)
cache.end_step(step, [1, 2, 3])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy of the tracked sources by the declared back end."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "Makefile"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("allocators", "kvtoolkit", "cuda_src"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                place = source / file.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read_bytes())
    build = "import sys, setuptools.build_meta as b; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)"
    subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def python_files(folder):
    return {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts}


def test_every_package_of_the_tree_is_declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    declared = set(settings["options"]["packages"].split())
    found = {
        ".".join(Path(file).parent.parts) for folder in ("allocators", "kvtoolkit") for file in python_files(folder)
    }
    assert declared == found | {"kvtoolkit.cuda_src"}


def test_the_wheel_carries_code_types_and_cuda_sources(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    headers = {f"kvtoolkit/{p.relative_to(ROOT)}" for p in (ROOT / "cuda_src").rglob("*.cuh")}
    assert headers
    assert names >= python_files("allocators") | python_files("kvtoolkit") | headers
    assert {"allocators/py.typed", "kvtoolkit/py.typed"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    (points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(built[0]).read(points).decode()
    assert "kvtoolkit = kvtoolkit.commands.cli:main" in text
    assert "buddy = allocators.buddy:BuddyAllocator" in text


def test_the_sdist_carries_what_the_wheel_is_made_of(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert python_files("allocators") | python_files("kvtoolkit") <= names
    assert {"cuda_src/include/kvt/entry.cuh", "LICENSE", "README.md", "CHANGELOG.md", "setup.cfg"} <= names


@pytest.fixture(scope="module")
def run_installed(built, tmp_path_factory):
    """Runs a program in a read-only install of the wheel."""
    site = tmp_path_factory.mktemp("install") / "site"
    zipfile.ZipFile(built[0]).extractall(site)
    for path in [*site.rglob("*"), site]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def run(program, **environment):
        result = subprocess.run(
            [sys.executable, "-c", IMPORTS + program],
            env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **environment},
            cwd=site.parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        where, *said = result.stdout.split()
        assert where == str(site / "kvtoolkit" / "__init__.py")
        return said

    return run


def test_a_read_only_install_works_with_numpy_and_numba_alone(run_installed):
    # compiled code comes from the same cache as that of the other tests, because the sources are equal
    assert run_installed(CACHE) == []


def test_a_read_only_install_needs_no_place_for_compiled_code(run_installed, tmp_path):
    unwritable = tmp_path / "home"
    unwritable.write_text("a file, so no folder can be made in it")
    places = {"HOME": str(unwritable), "XDG_CACHE_HOME": str(unwritable), "KVTOOLKIT_CACHE_DIR": ""}
    assert run_installed(ALLOCATOR, **places) == ["None"]


def test_a_plug_in_of_pytest_that_disables_itself_beside_xdist_is_no_error():
    warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.", Warning, stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("another one", UserWarning, stacklevel=1)
