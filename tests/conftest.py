"""Puts the project's root on sys.path, so that tests import dasc as the scripts do."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on small tensors more threads wait for each other

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from browser import CHROMIUM, FIREFOX, Chromium, Firefox
from filelock import FileLock
from pipeline import LIGHT, readme_commands, succeed
from review_page import Fake, state_of

from dasc.model import engine

engine.PAYS_PX = math.inf  # what is compared to the byte is scored by one engine; tests/test_engine.py takes both

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; the children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("kill_resume", "review", "processes", "fuzz", "sigle", "weak_mining", "reproducible")  # more than 30 s each


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the moments at which runs are killed, and of the fuzzing")
    parser.addoption("--fuzz_seconds", type=float, default=25.0, help="how long tests/test_fuzz.py tries inputs")


def pytest_collection_modifyitems(items):
    """The longest files first: one that starts as the last leaves the other process of `make test` without work."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_terminal_summary(terminalreporter):
    """What tests wrote down with record_property: the moments of kills, the numbers of inputs."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder for all tests, made once, by whichever process of pytest-xdist needs it first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.is_file():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Stages 0, 1 and 2 on a small synthetic sample: sample/, patches/ and NS/ in one folder, not to be changed."""
    return made_once(tmp_path_factory, "small_run", make_small_run)


def make_small_run(folder):
    succeed("pre/make_sample.py", "--out", folder / "sample", "--size_px", 700, "--mitoses", 4, "--imposters", 6)
    succeed("pre/cut_patch_2.py", *sample_flags(folder), "--out", folder / "patches")
    succeed("NS/sigle.py", *LIGHT, "--manifest", folder / "patches/patches.csv", "--out", folder / "NS", "--epochs", 2)


@pytest.fixture(scope="session")
def readme_run(tmp_path_factory):
    """The README's commands in a folder, not to be changed; made.json: the files that each wrote."""
    return made_once(tmp_path_factory, "readme_run", make_readme_run)


def make_readme_run(folder):
    here, made = Path.cwd(), {}
    os.chdir(folder)
    try:
        for command, script, flags in readme_commands():
            before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            succeed(script, *flags)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            new = [path for path in files if before.get(path) != path.stat().st_mtime_ns]
            made[command] = [path.relative_to(folder).as_posix() for path in new]
    finally:
        os.chdir(here)
    (folder / "made.json").write_text(json.dumps(made))


def sample_flags(folder: Path) -> list[object]:
    return ["--dataset", "sample", "--data_root", folder / "sample", "--patch_size", 64, "--random_per_field", 20]


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def browser(request, tmp_path_factory):
    """Each browser, one for all tests of a file."""
    kind, program = {"chromium": (Chromium, CHROMIUM), "firefox": (Firefox, FIREFOX)}[request.param]
    if program is None:
        pytest.skip(f"needs {request.param}")
    browser = kind(tmp_path_factory.mktemp(request.param))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Chromium, for what is alike in both browsers or only it can tell."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium, or Chrome")
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def serve():
    """Starts servers for the review page and stops them after the test."""
    servers = []

    def start(cells: int = 60, **changes) -> Fake:
        servers.append(Fake(state_of(cells, **changes)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
