"""The networks and what is kept of them on disk: shapes, detectors, initial weights, files that must be refused."""

import argparse
import os
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import timm
import torch
from torch import nn

from dasc.errors import InputError
from dasc.files import sha256
from dasc.judge.calibration import Calibration
from dasc.model.checkpoint import Detector, load_detector, read_checkpoint, save_checkpoint, save_detector
from dasc.model.network import CamNetwork, fold_batch_norms
from dasc.model.start import interpolate, load_initial_weights, read_last, training_settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("backbone", "channels"), [("resnet18", 256), ("resnet10t", 256), ("mobilenetv3_small_100", 48)]
)
def test_shapes(backbone, channels):
    network = CamNetwork(backbone)
    patches = torch.rand(2, 3, 80, 80)
    features = network.features(patches)
    assert features.shape == (2, channels, 5, 5)
    assert network.cam(features).shape == (2, 2, 5, 5)
    assert torch.allclose(network(patches), network.cam(network.features(patches)).amax(dim=(2, 3)), atol=1e-4)


def test_errors_name_the_backbone():
    with pytest.raises(InputError, match="unknown backbone 'resnet1888'"):
        CamNetwork("resnet1888")
    with pytest.raises(InputError, match="none at 7"):
        CamNetwork("resnet18", stride=7)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mambaout_femto"])
def test_a_backbone_for_one_size_of_image_is_refused(backbone):
    """Mambaout gives its maps with the channels last; older releases of timm do not have it."""
    if not timm.is_model(backbone):
        pytest.skip(f"timm {timm.__version__} has no {backbone}")
    with pytest.raises(InputError, match=rf"{backbone}: .* choose a convolutional backbone, such as resnet18"):
        CamNetwork(backbone)


def test_hub_that_does_not_answer(monkeypatch):
    def no_answer(*_, pretrained=False, **__):
        raise OSError("no route to host")

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: (no_answer if k.get("pretrained") else create)(*a, **k))
    with pytest.raises(InputError, match="--init_weights FILE"):
        CamNetwork("resnet10t", pretrained=True)


def test_weights_from_disk(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    network = CamNetwork("resnet10t")
    assert load_initial_weights(network, tmp_path / "weights.pt") is None
    loaded = network.backbone.state_dict()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.items())
    with pytest.raises(InputError, match="does not fit the backbone"):
        load_initial_weights(CamNetwork("mobilenetv3_small_100"), tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_from_a_checkpoint(tmp_path, dtype):
    torch.manual_seed(1)
    source = detector()
    weights = source.network.state_dict()
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_detector(tmp_path / "model.pt", source, weights)
    network = CamNetwork("resnet10t")
    head = network.cam_head.weight.clone()
    start = load_initial_weights(network, tmp_path / "model.pt")
    assert start.keys() == network.state_dict().keys() and start["cam_head.weight"].dtype == torch.float32
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, weights[f"backbone.{name}"].to(tensor.dtype))
    assert torch.equal(network.cam_head.weight, head)


def detector(**changes):
    network = CamNetwork("resnet10t").eval()
    return Detector(network, 64, 0.25, False, per_mm2=1800.0, merge_um=6.0, views=4, manifest_sha256="ab", **changes)


CURVE = {"threshold": [0.2, 0.5], "precision": [0.5, 0.8], "recall": [0.9, 0.4], "f1": [0.6, 0.5]}
FITTED = {"threshold": 0.4, "calibration": Calibration(1.5, -2.0, -3.5), "val_curve": CURVE}


def saved(path, change=lambda content: None, **changes):
    """A detector's file with a changed content or config."""
    one = detector()
    save_detector(path, one, one.network.state_dict())
    content = read_checkpoint(path)
    content["config"].update(changes)
    change(content)
    save_checkpoint(path, content)


@pytest.mark.parametrize("fitted", [{}, FITTED], ids=["plain", "fitted"])
def test_a_detector_comes_back_as_it_was(tmp_path, fitted):
    trained_one = detector(**fitted)
    weights = trained_one.network.state_dict()
    save_detector(tmp_path / "model.pt", trained_one, weights, hard_sha256="cd", scl_sha256=None)
    loaded = load_detector(tmp_path / "model.pt", CPU)
    assert loaded.sha256 == sha256(tmp_path / "model.pt") and not loaded.network.training
    same = {"network": trained_one.network, "sha256": ""}
    assert replace(loaded, **same) == trained_one
    assert (loaded.network.backbone_name, loaded.network.stride) == ("resnet10t", 16)
    patches = torch.rand(2, 3, 80, 80)
    assert torch.allclose(loaded.network(patches), trained_one.network(patches), atol=1e-4)
    config = read_checkpoint(tmp_path / "model.pt")["config"]
    assert config["hard_sha256"] == "cd" and "scl_sha256" not in config and config["network"] == "cam"
    with pytest.raises(FrozenInstanceError):
        loaded.threshold = 0.1


def test_the_same_detector_gives_the_same_bytes(tmp_path):
    """However its texts came about: pickle writes a text anew unless it is the same object."""
    one = detector(**FITTED)
    save_detector(tmp_path / "a.pt", one, one.network.state_dict())
    again, content = load_detector(tmp_path / "a.pt", CPU), read_checkpoint(tmp_path / "a.pt")
    save_detector(tmp_path / "b.pt", again, content["model"])
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    save_detector(tmp_path / "b.pt", replace(again, views=8), content["model"])
    assert (tmp_path / "a.pt").read_bytes() != (tmp_path / "b.pt").read_bytes()


def trained(network):
    """In evaluation mode, with batch norms that do something."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(3 * torch.rand(8, 3, 64, 64) - 1)
    return network.eval()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0"])
def test_folded_batch_norms_give_the_same_logits(backbone):
    network = trained(CamNetwork(backbone))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norms(network)
    patches = torch.rand(4, 3, 80, 80)
    with torch.inference_mode():
        assert torch.allclose(folded(patches), network(patches), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not folded.training


def test_a_network_in_which_a_norm_does_not_follow_its_neighbour_stays_as_it_is():
    class Crossed(CamNetwork):
        def features(self, patches):
            return self.late(self.norm(self.early(patches)))

        def __init__(self):
            super().__init__("resnet10t")
            self.early, self.late, self.norm = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)

    network = trained(Crossed())
    patches = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(fold_batch_norms(network)(patches), network(patches))


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm-done",)


def without(*keys):
    def change(content):
        for key in keys:
            del content["config"][key]

    return change


@pytest.mark.parametrize("fault", ["missing", "truncated", "pickle", "text"])
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    if fault == "truncated":
        saved(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "pickle":
        path.write_bytes(pickle.dumps(Harm()))
    elif fault == "text":
        path.write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"model\.pt"):
        load_detector(path, CPU)
    assert not (tmp_path / "harm-done").exists()


MISFITS = {
    "an older version": (
        {"change": without("per_mm2", "merge_um", "views")},
        "made by an older version, its config lacks per_mm2, merge_um, views; train it again",
    ),
    "no um/px": ({"change": without("um_per_px")}, "its config lacks um_per_px"),
    "classes": ({"classes": ["mitosis", "negative"]}, r"its classes are \['mitosis'"),
    "another backbone": ({"backbone": "mobilenetv3_small_100"}, "do not fit its own config"),
    "dual": ({"network": "dual"}, "dual network of stage 4"),
    "dual, without the rest": ({"network": "dual", "change": without("views", "threshold")}, "dual network of stage 4"),
}


@pytest.mark.parametrize("fault", MISFITS)
def test_what_is_no_detector_of_this_version_is_refused(tmp_path, fault):
    changes, says = MISFITS[fault]
    saved(tmp_path / "model.pt", **changes)
    with pytest.raises(InputError, match=rf"model\.pt.*{says}"):
        load_detector(tmp_path / "model.pt", CPU)


STRANGE = {
    "network": ["other", None],
    "stride": [0, 16.0, True],
    "patch_size": [0, 5000, "64"],
    "um_per_px": [-1.0, "0.25", float("nan")],
    "normalise_stain": [1, None],
    "threshold": [None, "best", float("nan")],
    "temperature": [0.0, -1.0, float("inf")],
    "offset": [None, float("inf")],
    "alignment": ["low", float("nan"), True],
    "val_curve": [[], {"threshold": [0.1]}, CURVE | {"recall": [0.1]}, CURVE | {"recall": ["a", "b"]}],
    "per_mm2": [0, -1.0, None, float("inf")],
    "merge_um": [-1.0, None],
    "views": [0, 3, 8.0, True, None],
    "manifest_sha256": [5],
}


@pytest.mark.parametrize("name", STRANGE)
def test_impossible_values_are_refused(tmp_path, name):
    for value in STRANGE[name]:
        saved(tmp_path / "model.pt", **{name: value})
        with pytest.raises(InputError, match=rf"its config has {name} .*; train it again"):
            load_detector(tmp_path / "model.pt", CPU)


def test_values_at_the_edge_are_taken(tmp_path):
    saved(tmp_path / "model.pt", um_per_px=None, manifest_sha256=None, merge_um=0, per_mm2=1, something=["else"])
    loaded = load_detector(tmp_path / "model.pt", CPU)
    assert (loaded.patch_um_per_px, loaded.manifest_sha256, loaded.merge_um, loaded.per_mm2) == (None, None, 0, 1)


def test_interpolated_weights_lie_between():
    trained_ones = {"a": torch.tensor([1.0, 2.0]), "count": torch.tensor(7)}
    start = {"a": torch.tensor([3.0, 6.0], dtype=torch.float64), "count": torch.tensor(1)}
    for share, expected in ((0.0, [1.0, 2.0]), (0.25, [1.5, 3.0]), (1.0, [3.0, 6.0])):
        between = interpolate(trained_ones, start, share)
        assert between["a"].tolist() == expected and between["a"].dtype == torch.float32 and between["count"] == 7


KEYS = ("model", "log")


@pytest.fixture
def begun(tmp_path):
    """Flags and files of a training, and a function that reads its last.pt for other ones."""
    files = {name: tmp_path / f"{name}.csv" for name in ("manifest", "hard")}
    for name, path in files.items():
        path.write_text(name)
    flags = {"epochs": 5, "lr": 1e-4, "backbone": "resnet10t", "seed": 0, "out": "a", "device": "cpu", "resume": False}
    flags |= {"manifest": str(files["manifest"]), "hard": str(files["hard"]), "views": 8, "workers": 2}
    settings = training_settings(argparse.Namespace(**flags), **files, init_weights="")
    last = {"model": {"a": torch.ones(2)}, "log": [], "settings": settings}
    save_checkpoint(tmp_path / "last.pt", last)

    def read(changed_files=(), **changed):
        namespace = argparse.Namespace(**flags | changed)
        return read_last(tmp_path / "last.pt", training_settings(namespace, **files | dict(changed_files)), KEYS)

    return files, settings, read


def test_what_an_epoch_depends_on(begun):
    files, settings, _ = begun
    assert settings == {
        "epochs": 5,
        "lr": 1e-4,
        "backbone": "resnet10t",
        "seed": 0,
        "manifest_sha256": sha256(files["manifest"]),
        "hard_sha256": sha256(files["hard"]),
    }


def test_an_interrupted_training_goes_on(begun, tmp_path):
    files, settings, read = begun
    moved = tmp_path / "moved.csv"
    files["hard"].rename(moved)
    elsewhere = {"hard": str(moved), "out": "b", "device": "cuda", "workers": 9, "views": 1, "resume": True}
    last = read({"hard": moved}, **elsewhere)
    assert last["settings"] == settings and torch.equal(last["model"]["a"], torch.ones(2))


def test_another_training_is_not_gone_on_with(begun, tmp_path):
    files, _, read = begun
    with pytest.raises(InputError, match=r"last\.pt: was begun with --epochs 5, not 6"):
        read(epochs=6)
    with pytest.raises(InputError, match="with another table than --hard names; leave out --resume"):
        read({"hard": None})
    with pytest.raises(InputError, match="with other weights than --init_weights names; leave out --resume"):
        read({"init_weights": files["hard"]})
    files["manifest"].write_text("changed")
    with pytest.raises(InputError, match="with another table than --manifest names; leave out --resume"):
        read(epochs=6)


def test_what_is_no_interrupted_training(begun, tmp_path):
    _, settings, read = begun
    for content in (
        [1],
        {"model": {}, "config": {}},
        {"model": {}, "settings": settings},
        {"model": {}, "log": []},
        {"model": {}, "log": [], "settings": 5},
    ):
        save_checkpoint(tmp_path / "last.pt", content)
        with pytest.raises(InputError, match=r"last\.pt: expected the last\.pt of an interrupted training"):
            read()
    (tmp_path / "last.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read()
    (tmp_path / "last.pt").unlink()
    with pytest.raises(InputError, match="nothing to resume from, leave out --resume"):
        read()
