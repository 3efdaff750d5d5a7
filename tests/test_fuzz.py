"""Broken files of every kind that is read: read or refused in one line, never a crash, a hang or a stray file."""

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory and asks /proc")


@pytest.fixture(scope="module")
def child():
    """The process that reads, one for both tests: it takes seconds to start."""
    from fuzz import Child

    with Child() as child:
        yield child


def test_broken_inputs_are_read_or_refused(child, request, record_property):
    from fuzz import KINDS, fuzz

    seed, seconds = request.config.getoption("--seed"), request.config.getoption("--fuzz_seconds")
    counts, findings = fuzz(child, seconds, seed, list(KINDS))
    tried = ", ".join(f"{kind} {count.total()}" for kind, count in counts.items())
    record_property("broken inputs tried", f"seed {seed}, {sum(count.total() for count in counts.values())}: {tried}")
    assert all(count["refused"] for count in counts.values()), counts
    again = [
        f"tests/fuzz.py --kind {one[0][0]!r} --first {one[0][1]} --seed {seed}\n{one[0][2]}"
        for one in findings.values()
    ]
    assert not findings, "\n\n".join(again)


def test_the_fuzzing_tells_what_goes_wrong(child, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "limit_s", 5)
    folder = tmp_path / "input"
    folder.mkdir()
    assert "MemoryError" in child.read("memory", folder)
    assert child.read("outside", folder).startswith("written outside the output folder")
    assert child.read("inside", folder) == "read"
    assert child.read("table CSV", folder).startswith("refused: ")
    assert "SIGABRT" in child.read("crash", folder)
    assert child.read("hang", folder) == "no end after 5 s"
