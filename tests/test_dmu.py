"""Stage 4: a memory of every training patch, and what is wrong with its input."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import LIGHT, fails, succeed

from dasc.data.splits import nucleus_of
from dasc.model.checkpoint import read_checkpoint
from dasc.model.network import CamNetwork, DualNetwork

SHORT = ["--epochs", 3, "--count_after", 1, "--warmup", 1]
COLUMNS = ["patch", "label", "origin", "clean", "hard", "noisy", "learned", "forgotten", "confidence_weak"]
COLUMNS += ["confidence_strong", "confidence_fused", "centroid_distance", "noise_score"]


def flags(small_run, out, *more):
    return [*LIGHT, *SHORT, "--manifest", small_run / "patches/patches.csv", "--out", out, *more]


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("dmu") / "DMU"
    done = succeed("DMU/main.py", *flags(small_run, out))
    return out, done


def test_memory_has_every_training_patch_in_order(small_run, finished):
    out, done = finished
    memory = pd.read_csv(out / "memory.csv")
    manifest = pd.read_csv(small_run / "patches/patches.csv")
    train = manifest[manifest["split"] == "train"].reset_index(drop=True)
    assert list(memory) == COLUMNS
    pd.testing.assert_frame_equal(memory[["patch", "label", "origin"]], train[["patch", "label", "origin"]])
    assert (memory[["clean", "hard", "noisy"]].sum(axis=1) == 2).all()  # three epochs, counted after the first
    assert (memory[["learned", "forgotten"]].sum(axis=1) == 2).all()
    for column in ("confidence_weak", "confidence_strong", "confidence_fused", "centroid_distance", "noise_score"):
        assert memory[column].between(0, 1).all() and memory[column].nunique() > len(memory) / 4
    assert f"{(train['label'] == 1).sum()} patches" in done.out


def test_shifted_copies_have_the_memory_of_their_mitosis(small_run, finished):
    memory = pd.read_csv(finished[0] / "memory.csv").set_index("patch")
    train = pd.read_csv(small_run / "patches/patches.csv").query("split == 'train'")
    owner = nucleus_of(train)
    copies = train["origin"] == "shifted"
    numbers = [column for column in COLUMNS if column not in ("patch", "label", "origin")]
    assert (
        copies.sum() == 3 * (train["origin"] == "annotated").sum() and (owner[copies] != train["patch"][copies]).all()
    )
    assert (memory.loc[train["patch"], numbers].to_numpy() == memory.loc[owner, numbers].to_numpy()).all()
    mitoses = memory[memory["origin"] == "annotated"]
    assert mitoses["noise_score"].nunique() > len(mitoses) / 2


def test_log_curves_and_checkpoint(finished):
    out, _ = finished
    log = pd.read_csv(out / "log.csv")
    assert list(log["epoch"]) == [0, 1, 2] and log["loss"].iloc[-1] < log["loss"].iloc[0]
    assert (log["skipped"] == 0).all()
    for prefix in ("", "negative_", "mitosis_"):
        states = log[[f"{prefix}{state}" for state in ("clean", "hard", "noisy")]]
        assert np.allclose(states.sum(axis=1), 1, atol=1e-5)
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "run.json").read_text())["arguments"]["count_after"] == 1
    content = read_checkpoint(out / "model.pt")
    network = DualNetwork(content["config"]["backbone"], content["config"]["stride"])
    network.load_state_dict(content["model"])


def test_resume_refuses_another_manifest_and_other_settings(small_run, finished, tmp_path):
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    shutil.copytree(finished[0], tmp_path / "DMU")
    path = tmp_path / "patches/patches.csv"
    table = pd.read_csv(path)
    table.drop(index=table.index[table["split"] == "train"][0]).to_csv(path, index=False)
    again = [*LIGHT, *SHORT, "--manifest", path, "--out", tmp_path / "DMU", "--resume"]
    before = (tmp_path / "DMU/memory.csv").read_bytes()
    fails("DMU/main.py", *again, says="another table than --manifest")
    fails("DMU/main.py", *flags(small_run, tmp_path / "DMU", "--resume", "--bias_correction", "False"), says="--bias_c")
    fails("DMU/main.py", *flags(small_run, tmp_path / "empty", "--resume"), says="last.pt")
    assert (tmp_path / "DMU/memory.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--epochs", 1, "--count_after", 0], "raise EPOCHS"),
        (["--count_after", 3], "--count_after 3"),
        (["--score_after", 3], "lower SCORE_AFTER"),
        (["--loss_q", 1.5], "--loss_q 1.5"),
    ],
)
def test_too_few_epochs_name_the_constant(small_run, tmp_path, more, says):
    fails("DMU/main.py", *flags(small_run, tmp_path / "DMU", *more), says=says)
    assert not (tmp_path / "DMU").exists()


def test_one_label_says_how_many(small_run, tmp_path):
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    path = tmp_path / "patches/patches.csv"
    table = pd.read_csv(path)
    table[table["label"] == 0].to_csv(path, index=False)
    number = ((table["label"] == 0) & (table["split"] == "train")).sum()
    says = f"{number} negative, 0 mitosis"
    fails("DMU/main.py", *LIGHT, *SHORT, "--manifest", path, "--out", tmp_path / "DMU", says=says)
    assert not (tmp_path / "DMU").exists()


def test_missing_manifest_names_its_command(tmp_path):
    fails("DMU/main.py", "--manifest", tmp_path / "patches.csv", says="pre/cut_patch_2.py")


def test_loss_that_is_not_finite_stops_with_advice(small_run, tmp_path):
    wild = ["--lr", 1e30, "--nan_steps", 2]
    fails("DMU/main.py", *flags(small_run, tmp_path / "DMU", *wild), says="lower --lr")
    assert not (tmp_path / "DMU/memory.csv").exists()


def test_dual_network_is_two_search_networks_and_a_fused_head():
    torch.manual_seed(0)
    network = DualNetwork("mobilenetv3_small_100").eval()
    weak, strong = torch.rand(2, 3, 3, 64, 64)
    logits, features = network(weak, strong)
    assert logits.shape == (3, 3, 2) and features.shape == (3, network.width) == (3, 96)
    for view, patches, branch in ((0, weak, network.weak), (1, strong, network.strong)):
        assert isinstance(branch, CamNetwork) and torch.allclose(logits[view], branch(patches), atol=1e-4)
    both = torch.cat([network.weak.features(weak), network.strong.features(strong)], dim=1)
    assert torch.allclose(logits[2], network.fused_head(both).amax(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(features, both.mean(dim=(2, 3)), atol=1e-5)
