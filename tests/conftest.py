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


def pytest_addoption(parser):
    parser.addoption(
        "--without-prompt-kernel", action="store_true", help="run the GPU tests as if the device had no prompt kernel"
    )


def pytest_sessionstart(session):
    if session.config.getoption("--without-prompt-kernel"):
        from kvtoolkit.cuda import prompt

        prompt.arch_of = lambda device: 80


def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.hasplugin("timeout"):  # a test that hangs fails, and says where
        for item in items:
            item.add_marker(pytest.mark.timeout(900))
    if "sweep" not in (config.option.markexpr or ""):  # minutes: only where they are asked for
        swept = [item for item in items if item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=swept)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not has_device():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Show what tests have to say that is no failure: their user property ``note``."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    notes = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "note"]
    if notes:
        terminalreporter.section("notes")
        for note in dict.fromkeys(notes):
            terminalreporter.line(note)
