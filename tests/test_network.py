"""The search network and its checkpoint: shapes, weights from disk, and files that must be refused."""

import os
import pickle

import pytest
import timm
import torch
from torch import nn

from dasc.errors import InputError
from dasc.model.checkpoint import load_backbone_weights, load_network, save_checkpoint
from dasc.model.network import CLASSES, SearchNetwork, fold_batch_norms

CONFIG = {
    "backbone": "resnet10t",
    "stride": 16,
    "patch_size": 64,
    "um_per_px": 0.25,
    "normalise_stain": False,
    "threshold": 0.4,
}


@pytest.mark.parametrize(
    ("backbone", "channels"), [("resnet18", 256), ("resnet10t", 256), ("mobilenetv3_small_100", 48)]
)
def test_shapes(backbone, channels):
    network = SearchNetwork(backbone)
    patches = torch.rand(2, 3, 80, 80)
    features = network.features(patches)
    assert features.shape == (2, channels, 5, 5)
    assert network.cam(features).shape == (2, 2, 5, 5)
    assert torch.allclose(network(patches), network.cam(network.features(patches)).amax(dim=(2, 3)), atol=1e-4)


def test_errors_name_the_backbone():
    with pytest.raises(InputError, match="unknown backbone 'resnet1888'"):
        SearchNetwork("resnet1888")
    with pytest.raises(InputError, match="none at 7"):
        SearchNetwork("resnet18", stride=7)


def test_hub_that_does_not_answer(monkeypatch):
    def no_answer(*_, pretrained=False, **__):
        raise OSError("no route to host")

    strides = timm.create_model("resnet10t", features_only=True)
    answers = iter([strides])
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: no_answer() if k.get("pretrained") else next(answers))
    with pytest.raises(InputError, match="--init_weights FILE"):
        SearchNetwork("resnet10t", pretrained=True)


def test_weights_from_disk(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    network = SearchNetwork("resnet10t")
    assert load_backbone_weights(network, tmp_path / "weights.pt") is None
    loaded = network.backbone.state_dict()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in loaded.items())
    with pytest.raises(InputError, match="does not fit the backbone"):
        load_backbone_weights(SearchNetwork("mobilenetv3_small_100"), tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_from_a_checkpoint(tmp_path, dtype):
    torch.manual_seed(1)
    content = checkpoint()
    content["model"] = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in content["model"].items()
    }
    save_checkpoint(tmp_path / "model.pt", content)
    network = SearchNetwork("resnet10t")
    head = network.cam_head.weight.clone()
    start = load_backbone_weights(network, tmp_path / "model.pt")
    assert start.keys() == network.state_dict().keys() and start["cam_head.weight"].dtype == torch.float32
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, content["model"][f"backbone.{name}"].to(tensor.dtype))
    assert torch.equal(network.cam_head.weight, head)


def checkpoint(**changes):
    config = {**CONFIG, "classes": list(CLASSES), "manifest_sha256": ""} | changes
    return {"model": SearchNetwork("resnet10t").state_dict(), "config": config}


def test_checkpoint_round_trip(tmp_path):
    content = checkpoint()
    save_checkpoint(tmp_path / "model.pt", content)
    network, config = load_network(tmp_path / "model.pt", torch.device("cpu"))
    assert config == content["config"] and not network.training
    source = SearchNetwork("resnet10t").eval()
    source.load_state_dict(content["model"])
    patches = torch.rand(2, 3, 80, 80)
    assert torch.allclose(network(patches), source(patches), atol=1e-4)


def trained(network):
    """In evaluation mode, with batch norms that do something."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(3 * torch.rand(8, 3, 64, 64) - 1)
    return network.eval()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0"])
def test_folded_batch_norms_give_the_same_logits(backbone):
    network = trained(SearchNetwork(backbone))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norms(network)
    patches = torch.rand(4, 3, 80, 80)
    with torch.inference_mode():
        assert torch.allclose(folded(patches), network(patches), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not folded.training


def test_a_network_in_which_a_norm_does_not_follow_its_neighbour_stays_as_it_is():
    class Crossed(SearchNetwork):
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


@pytest.mark.parametrize("fault", ["missing", "truncated", "pickle", "text", "incomplete", "classes", "other"])
def test_bad_checkpoint_is_refused(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    if fault == "truncated":
        save_checkpoint(path, checkpoint())
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "pickle":
        path.write_bytes(pickle.dumps(Harm()))
    elif fault == "text":
        path.write_text("not a checkpoint")
    elif fault == "incomplete":
        content = checkpoint()
        del content["config"]["um_per_px"]
        save_checkpoint(path, content)
    elif fault == "classes":
        save_checkpoint(path, checkpoint(classes=["mitosis", "negative"]))
    elif fault == "other":
        save_checkpoint(path, checkpoint(backbone="mobilenetv3_small_100"))
    with pytest.raises(InputError, match=r"model\.pt"):
        load_network(path, torch.device("cpu"))
    assert not (tmp_path / "harm-done").exists()
