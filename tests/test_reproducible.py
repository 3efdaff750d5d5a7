"""Same seed, same machine, CPU: the README's commands run again give the same tables and the same weights."""

import json
import os

import numpy as np
import pytest
from moments import run_child
from pipeline import readme_commands

from dasc.data.pack import PACK

# When and how long a run was, and where (cut.json: the dataset's folder); everything else is the same to the last byte.
TELLS_TIME_OR_PLACE = ("run.json", "report.html", "cut.json")


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_the_same_commands_give_the_same_bytes(readme_run, tmp_path, monkeypatch):
    """In processes of their own, whose hashes of strings and random states are others."""
    monkeypatch.chdir(tmp_path)
    for number, (_, script, flags) in enumerate(readme_commands()):
        run = run_child(tmp_path / f"{number}.log", script, *flags)
        assert run.status == 0, run.said
    kinds, different = {}, []
    for path in sorted(path for folder in ("data", "results") for path in (readme_run / folder).rglob("*")):
        if path.is_file() and path.name not in TELLS_TIME_OR_PLACE:
            again = tmp_path / path.relative_to(readme_run)
            kinds[path.suffix] = kinds.get(path.suffix, 0) + 1
            if path.name == PACK and again.is_file():  # behind the patches it tells when each file was written
                assert (np.load(again) == np.load(path)).all()
            elif not again.is_file() or again.read_bytes() != path.read_bytes():
                different.append(path.relative_to(readme_run).as_posix())
    assert not different
    made = [name for names in json.loads((readme_run / "made.json").read_text()).values() for name in names]
    models = {name for name in made if name.endswith(".pt")}
    assert len(models) == 9 and kinds[".pt"] == len(models) and kinds[".csv"] > 20
