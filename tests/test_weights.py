"""The model in weights/ works on a fresh clone."""

import numpy as np
import pandas as pd
import torch
from pipeline import ROOT, succeed

from dasc.files import sha256
from dasc.network import SearchNetwork, load_backbone_weights, load_network

WEIGHTS = ROOT / "weights" / "dasc_mitos.pt"


def test_file_is_small_and_holds_what_predicting_needs():
    assert WEIGHTS.stat().st_size < 12e6
    network, config = load_network(WEIGHTS, torch.device("cpu"))
    assert (config["patch_size"], config["um_per_px"], config["normalise_stain"]) == (96, 0.167, True)
    assert 0 < config["threshold"] < 1 and config["temperature"] > 0
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_a_training_starts_from_it():
    network = SearchNetwork("tf_efficientnet_lite0", 32)
    load_backbone_weights(network, WEIGHTS)
    learned = torch.load(WEIGHTS, weights_only=True)["model"]
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, learned[f"backbone.{name}"].to(tensor.dtype))


def test_model_card_names_the_file():
    assert sha256(WEIGHTS)[:16] in (WEIGHTS.parent / "README.md").read_text(encoding="utf-8")


def test_it_predicts(small_run, tmp_path):
    images = sorted((small_run / "sample/images").iterdir())[:1]
    succeed("predict.py", "--images", *images, "--model_path", WEIGHTS, "--device", "cpu", "--out", tmp_path)
    detections = pd.read_csv(tmp_path / "detections.csv")
    assert len(detections) and np.isfinite(detections["probability"]).all()
    assert (tmp_path / "report.html").is_file()
