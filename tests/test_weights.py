"""The models in weights/ work on a fresh clone, and their recipe fits the scripts that it runs."""

import importlib.util
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import ROOT, succeed

from dasc.files import sha256
from dasc.model.checkpoint import load_detector
from dasc.model.network import CamNetwork
from dasc.model.start import load_initial_weights

PATCHES = {"dasc_mitos.pt": (96, 0.167), "dasc_figures.pt": (64, 0.25)}  # px, um/px, as the model card says
FILES = pytest.mark.parametrize("path", [ROOT / "weights" / name for name in PATCHES], ids=list(PATCHES))


@FILES
def test_file_is_small_and_holds_what_predicting_needs(path):
    assert path.stat().st_size < 12e6
    detector = load_detector(path, torch.device("cpu"))
    assert (detector.patch_size, detector.patch_um_per_px) == PATCHES[path.name] and detector.normalise_stain
    assert (detector.per_mm2, detector.merge_um, detector.views) == (500, 7.5, 8) and detector.first_look is not None
    assert 0 < detector.threshold < 1 and detector.calibration.fitted and detector.sha256 == sha256(path)
    assert detector.calibration.alignment is not None
    assert all(torch.isfinite(value).all() for value in detector.network.state_dict().values())


@FILES
def test_a_training_starts_from_it(path):
    network = CamNetwork("tf_efficientnet_lite0", 32)
    load_initial_weights(network, path)
    learned = torch.load(path, weights_only=True)["model"]
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, learned[f"backbone.{name}"].to(tensor.dtype))


@FILES
def test_model_card_names_the_file(path):
    assert sha256(path)[:16] in (path.parent / "README.md").read_text(encoding="utf-8")


@FILES
def test_it_predicts(path, small_run, tmp_path):
    images = sorted((small_run / "sample/images").iterdir())[:1]
    succeed("predict.py", "--images", *images, "--model_path", path, "--device", "cpu", "--out", tmp_path)
    detections = pd.read_csv(tmp_path / "detections.csv")
    assert len(detections) and np.isfinite(detections["probability"]).all()
    assert (tmp_path / "report.html").is_file()


@pytest.fixture
def recipe(monkeypatch):
    """weights/make/recipe.py, whose scripts only seem to run; what it has called in `commands`."""
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "weights/make/recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands, real = [], module.run

    def run(made: Path, script: str, *flags: object) -> Path:
        before = len(module.commands)
        real(made, script, *flags)
        if len(module.commands) > before:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()
        return made

    monkeypatch.setattr(module, "run", run)
    module.status = 0

    def pretend(command: list[str]) -> subprocess.CompletedProcess:
        module.commands.append(command[1:])
        return subprocess.CompletedProcess(command, module.status)

    monkeypatch.setattr(module.subprocess, "run", pretend)
    return module


@pytest.mark.parametrize("name", ["dasc_figures", "dasc_mitos"])
def test_the_recipe_gives_every_script_what_it_takes(name, recipe, tmp_path):
    """Flags that exist, and files that an earlier command has made."""
    getattr(recipe, name)(tmp_path / "data", tmp_path)
    assert (tmp_path / f"{name}.pt").exists() and len(recipe.commands) >= 7
    out = []
    for script, *words in recipe.commands:
        source = Path(script).read_text(encoding="utf-8")
        given = dict(pairwise(words))
        for flag in (word[2:] for word in words if word.startswith("--")):
            assert re.search(rf'^{flag.upper()}\b|"--{flag}"', source, flags=re.MULTILINE), f"{script} --{flag}"
        for flag, word in given.items():
            if word.startswith(str(tmp_path)) and flag not in ("--out", "--data"):
                assert Path(word).exists() and any(word.startswith(one) for one in out), f"{script} {flag} {word}"
        out.append(given["--out"])


def test_the_recipe_goes_on_where_it_stopped(recipe, tmp_path):
    recipe.dasc_mitos(tmp_path / "data", tmp_path)
    recipe.commands.clear()
    recipe.dasc_mitos(tmp_path / "data", tmp_path)
    assert not recipe.commands
    (tmp_path / "network/model.pt").rename(tmp_path / "network/last.pt")
    (tmp_path / "patches_look").rename(tmp_path / "patches_look.partial")
    recipe.dasc_mitos(tmp_path / "data", tmp_path)
    assert [Path(script).name for script, *_ in recipe.commands] == ["sigle.py", "cut_patch_2.py"]
    assert all(words[-1] == "--resume" for words in recipe.commands)


def test_the_recipe_ends_with_the_script_that_failed(recipe, tmp_path):
    recipe.status = 3
    with pytest.raises(SystemExit, match=r"lite0_weights.py: exit status 3; the same command goes on"):
        recipe.dasc_figures(tmp_path / "data", tmp_path)
    assert len(recipe.commands) == 1 and not (tmp_path / "lite0.pt").exists()
