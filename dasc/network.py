"""The search network: a timm backbone cut at one stride, a class activation map (CAM) head, and its checkpoint."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dasc.errors import InputError

CLASSES = ("negative", "mitosis")  # the order of the labels 0 and 1


class SearchNetwork(nn.Module):
    """Backbone up to one stride, 1x1 convolution to a CAM per class, global max pooling to logits.

    Takes patches (B, 3, H, W), float in 0..1, RGB; normalises them itself.

    Args:
        backbone: name of a timm model that gives feature maps.
        stride: pixels of the patch per cell of the feature map; 16 is the third block of a ResNet.
        pretrained: load timm's ImageNet weights, which needs the model hub.

    Raises:
        InputError: an unknown backbone, one without feature maps at that stride, or no answer from the hub.
    """

    def __init__(self, backbone: str, stride: int = 16, pretrained: bool = False) -> None:
        super().__init__()
        strides = _feature_strides(backbone)
        if stride not in strides:
            raise InputError(f"backbone {backbone}: has feature maps at strides {strides}, none at {stride}")
        options = {"features_only": True, "out_indices": (strides.index(stride),)}
        try:
            self.backbone = timm.create_model(backbone, pretrained=pretrained, **options)
        except Exception as error:  # hub clients raise types of their own, one family per release
            if not pretrained:
                raise
            raise InputError(
                f"backbone {backbone}: its ImageNet weights could not be loaded ({type(error).__name__}); without "
                "a network use --init_weights FILE with weights on disk, or --pretrained False to start from random"
            ) from error
        config = self.backbone.pretrained_cfg
        self.cam_head = nn.Conv2d(self.backbone.feature_info.channels()[-1], len(CLASSES), kernel_size=1)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    def features(self, patches: Tensor) -> Tensor:
        """Feature maps (B, C, H / stride, W / stride) of patches (B, 3, H, W)."""
        return self.backbone((patches - self.mean) / self.std)[-1]

    def cam(self, features: Tensor) -> Tensor:
        """Class activation maps (B, classes, h, w), in logits."""
        return self.cam_head(features)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits (B, classes): the largest activation of each class."""
        return self.cam(self.features(patches)).amax(dim=(2, 3))


def _feature_strides(backbone: str) -> list[int]:
    if not timm.is_model(backbone):
        near = timm.list_models(f"*{backbone[:6]}*")[:5] or timm.list_models("resnet1*")[:5]
        raise InputError(f"unknown backbone {backbone!r}; timm has for instance {', '.join(near)}")
    try:
        with torch.device("meta"):
            return timm.create_model(backbone, features_only=True).feature_info.reduction()
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"backbone {backbone}: gives no feature maps; choose a convolutional one") from error


def load_backbone_weights(network: SearchNetwork, path: Path) -> dict[str, Tensor] | None:
    """Start the backbone from weights on disk: a checkpoint of stage 2 or 8, or a timm state dict, whole or cut.

    Of a checkpoint the head stays out: only what the backbone has learned carries over to another training.

    Returns:
        The weights of a checkpoint that fits the whole network, head included, for `blend`; None of any other file.

    Raises:
        InputError: unreadable file, or weights of another backbone: every tensor the backbone has must be there.
    """
    content = read_tensors(path)
    content = content.get("model", content) if isinstance(content, dict) else {}
    whole = content if isinstance(content, dict) else {}
    weights = {str(name).removeprefix("backbone."): tensor for name, tensor in whole.items()}
    wanted = network.backbone.state_dict()
    absent = _absent(weights, wanted)
    if absent:
        raise InputError(
            f"{path}: does not fit the backbone: {len(absent)} of {len(wanted)} tensors are missing or of another "
            f"shape (first: {absent[0]}); expected a timm state dict, or a model.pt, of the same --backbone"
        )
    network.backbone.load_state_dict({name: weights[name] for name in wanted})
    wanted = network.state_dict()
    return None if _absent(whole, wanted) else {name: whole[name].to(tensor) for name, tensor in wanted.items()}


def _absent(weights: dict[str, Any], wanted: dict[str, Tensor]) -> list[str]:
    """Names of the wanted tensors that the weights lack, or have in another shape."""
    return [
        name
        for name, tensor in wanted.items()
        if not isinstance(weights.get(name), Tensor) or weights[name].shape != tensor.shape
    ]


def blend(trained: dict[str, Tensor], start: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights this share of the way back from the trained ones to those the training started from.

    What fine-tuning gains on its own slides, and what the start knew of others, are both kept (Wortsman et al. 2022,
    "Robust fine-tuning of zero-shot models").
    """
    return {
        name: tensor.lerp(start[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


@torch.no_grad()
def update_average(average: SearchNetwork, network: SearchNetwork, decay: float) -> None:
    """Move the running average of the weights towards the network's: average <- decay average + (1 - decay) weights."""
    of_average, of_network = (itertools.chain(each.parameters(), each.buffers()) for each in (average, network))
    for mean, now in zip(of_average, of_network, strict=True):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)  # the count of batches that BatchNorm has seen


def build_network(config: dict[str, Any]) -> SearchNetwork:
    """The network that a checkpoint's config describes, with random weights."""
    return SearchNetwork(config["backbone"], config["stride"])


@torch.no_grad()
def fold_batch_norms(network: SearchNetwork) -> SearchNetwork:
    """A copy for prediction, in evaluation mode, whose batch norms are part of the convolutions before them.

    It gives the same logits, to rounding, in less time: EfficientNet-Lite0 in half, ResNet18 in nine tenths. Where a
    backbone is built so that the logits would differ, the copy is left as the network is.
    """
    patches = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = patches.to(next(network.parameters()).device)
    plain, folded = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (first, convolution), (second, norm) in itertools.pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, getattr(norm, "act", nn.Identity()))  # timm's batch norms hold the activation
    same = torch.allclose(folded(patches), plain(patches), rtol=1e-3, atol=1e-3)
    return folded.to(memory_format=torch.channels_last) if same else plain


def load_network(path: Path, device: torch.device) -> tuple[SearchNetwork, dict[str, Any]]:
    """Load a checkpoint for prediction: the network with folded batch norms on `device`, and its config.

    Config: backbone, stride, patch_size (px), um_per_px, normalise_stain, threshold, classes, manifest_sha256.

    Raises:
        InputError: no such file, not a checkpoint (files that would run code are refused), or an incomplete one.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    if config.get("network") == "dual":
        raise InputError(f"{path}: holds the dual network of stage 4; expected a model of stage 2 (NS) or 8 (DMU_scl)")
    network = build_network(config)
    try:
        network.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit its own config ({config['backbone']})") from error
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise InputError(f"{path}: its weights are not all finite numbers; train it again")  # it would find nothing
    return fold_batch_norms(network.to(device, memory_format=torch.channels_last)), config


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours: a dict with at least model (state dict) and config.

    Raises:
        InputError: as `load_network`.
    """
    checkpoint = read_tensors(path)
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "model" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of this project (expected model and config in it)")
    wanted = ("backbone", "stride", "patch_size", "um_per_px", "normalise_stain", "threshold", "classes")
    absent = [key for key in wanted if key not in config]
    if absent:
        raise InputError(f"{path}: its config lacks {', '.join(absent)}; train it again")
    if config["classes"] != list(CLASSES):
        raise InputError(f"{path}: its classes are {str(config['classes'])[:60]}, expected {list(CLASSES)}")
    strange = [key for key, value in config.items() if not _is_sound(key, value)]
    if strange:
        value = str(config[strange[0]])[:60]
        raise InputError(f"{path}: its config has {strange[0]} {value!r}; train it again")
    return checkpoint


def _is_sound(key: str, value: Any) -> bool:
    """Whether a config may have this value; keys that no reader looks at may have any."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("stride", "patch_size"):
        return isinstance(value, int) and is_number and 0 < value <= 4096
    if key == "um_per_px":
        return value is None or (is_number and value >= 0)  # none: patches of unknown resolution
    if key in ("threshold", "offset", "background"):
        return is_number
    if key == "temperature":
        return is_number and value > 0
    if key == "val_curve":
        columns = list(value.values()) if isinstance(value, dict) else []
        return (
            isinstance(value, dict)
            and {"threshold", "precision", "recall"} <= value.keys()
            and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
            and all(isinstance(number, float | int) for column in columns for number in column)
        )
    return isinstance(value, {"backbone": str, "normalise_stain": bool}.get(key, object))


def check_same_run(path: Path, checkpoint: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise InputError where the checkpoint is none to resume from, or was begun with other settings or patches."""
    if not {"settings", "optimizer", "log"} <= checkpoint.keys() or "manifest_sha256" not in checkpoint["config"]:
        raise InputError(f"{path}: a model, expected the last.pt of an interrupted training; leave out --resume")
    if checkpoint["config"]["manifest_sha256"] != config["manifest_sha256"]:
        raise InputError(f"{path}: was trained on another manifest than {settings['manifest']}; leave out --resume")
    for name, value in settings.items():
        if checkpoint["settings"].get(name) != value:
            raise InputError(f"{path}: was begun with --{name} {checkpoint['settings'].get(name)}, not {value}")


def read_tensors(path: Path) -> Any:
    """Read tensors and plain types that torch saved, onto the CPU; InputError where a file holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a training script writes it (stage 2: NS/sigle.py); name another with "
            "--model_path, or leave out --resume"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the unpickler raise anything
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint, or one that would run code ({reason})") from error
