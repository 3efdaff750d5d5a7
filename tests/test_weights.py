"""The models in weights/ work on a fresh clone."""

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
