"""The networks: a timm backbone cut at one stride with a class activation map (CAM) head, and two of them in one."""

import copy
import functools
import itertools

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dasc.errors import InputError

CLASSES = ("negative", "mitosis")  # the order of the labels 0 and 1
TRIED_PX = 96  # side of the patch that every backbone is tried with


class CamNetwork(nn.Module):
    """Backbone up to one stride, 1x1 convolution to a CAM per class, global max pooling to logits.

    It takes patches (B, 3, H, W), float in 0..1, RGB, and normalises them itself.

    backbone: name of a timm model that gives feature maps.
    stride: px of the patch per cell of the feature map; 16 is the third block of a ResNet.
    pretrained: load timm's ImageNet weights, which needs the model hub.
    Raises: InputError: an unknown backbone, one without feature maps at that stride, no answer from the hub.
    """

    def __init__(self, backbone: str, stride: int = 16, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone_name, self.stride = backbone, stride  # what rebuilds it
        strides = _feature_strides(backbone)
        if stride not in strides:
            raise InputError(f"backbone {backbone}: has feature maps at strides {strides}, none at {stride}")
        options = {"features_only": True, "out_indices": (strides.index(stride),)}
        _check_maps(backbone, stride, strides.index(stride))
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


class DualNetwork(nn.Module):
    """Two CAM networks with weights of their own, and a 1x1 convolution on their concatenated feature maps.

    backbone, stride, pretrained: as `CamNetwork`, and its errors.
    """

    def __init__(self, backbone: str, stride: int = 16, pretrained: bool = False) -> None:
        super().__init__()
        self.weak = CamNetwork(backbone, stride, pretrained)
        self.strong = CamNetwork(backbone, stride, pretrained)
        self.width = self.weak.cam_head.in_channels + self.strong.cam_head.in_channels
        self.fused_head = nn.Conv2d(self.width, len(CLASSES), kernel_size=1)

    def forward(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (3, B, classes) of the weak, the strong and the fused head, and pooled features (B, width).

        weak, strong: (B, 3, H, W) float in 0..1, RGB, views of the same patches.
        """
        weak_map, strong_map = self.weak.features(weak), self.strong.features(strong)
        both = torch.cat([weak_map, strong_map], dim=1)
        cams = self.weak.cam(weak_map), self.strong.cam(strong_map), self.fused_head(both)
        return torch.stack([cam.amax(dim=(2, 3)) for cam in cams]), both.mean(dim=(2, 3))


@functools.cache  # two networks in one, and every later one of a process, are looked at once
def _feature_strides(backbone: str) -> list[int]:
    if not timm.is_model(backbone):
        near = timm.list_models(f"*{backbone[:6]}*")[:5] or timm.list_models("resnet1*")[:5]
        raise InputError(f"unknown backbone {backbone!r}; timm has for instance {', '.join(near)}")
    try:
        with torch.device("meta"):
            return timm.create_model(backbone, features_only=True).feature_info.reduction()
    except (RuntimeError, AttributeError) as error:
        raise InputError(
            f"backbone {backbone}: gives no feature maps; choose a convolutional backbone, such as resnet18"
        ) from error


@functools.cache
@torch.no_grad()
def _check_maps(backbone: str, stride: int, index: int) -> None:
    """Raise InputError where a backbone gives no map (B, C, h, w) of a patch of any size, as transformers do not."""
    try:
        with torch.device("meta"):  # shapes only
            network = timm.create_model(backbone, features_only=True, out_indices=(index,)).eval()
            shape = tuple(network(torch.zeros(1, 3, TRIED_PX, TRIED_PX))[-1].shape)
        found = f"gives {shape}"
    except (AssertionError, RuntimeError, ValueError) as error:
        shape, found = None, f"{str(error).splitlines()[0].rstrip('.')}" if str(error) else type(error).__name__
    channels = network.feature_info.channels()[-1]
    if shape is None or len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
        raise InputError(
            f"backbone {backbone}: a patch of {TRIED_PX} px must give feature maps (1, {channels}, side, side) at "
            f"stride {stride}; {found}; transformers (ViT, Swin) are made for one size of image: choose a "
            "convolutional backbone, such as resnet18"
        )


@torch.no_grad()
def fold_batch_norms(network: CamNetwork) -> CamNetwork:
    """A copy for prediction, in evaluation mode, whose batch norms are part of the convolutions before them.

    It gives the same logits, to rounding, in less time: EfficientNet-Lite0 in half, ResNet18 in nine tenths. Where a
    backbone is built so that the logits would differ, the copy is left as the network is.
    """
    patches = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = patches.to(next(network.parameters()).device)
    folded = copy.deepcopy(network).eval()
    plain = folded(patches)
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (first, convolution), (second, norm) in itertools.pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, getattr(norm, "act", nn.Identity()))  # timm's batch norms hold the activation
    if torch.allclose(folded(patches), plain, rtol=1e-3, atol=1e-3):
        return folded.to(memory_format=torch.channels_last)
    return copy.deepcopy(network).eval()
