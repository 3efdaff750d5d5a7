"""The first look: a small network that goes over a whole field once and says where mitoses may be.

It sees a field at the resolution at which candidates are searched, and gives a map of log odds, one cell per STRIDE px.
Features of a timm backbone at three strides are added up at the finest, as in a feature pyramid (Lin et al. 2017). The
loss is the focal loss on centres of CornerNet and CenterNet (Law & Deng 2018, Zhou et al. 2019).
"""

import copy
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from dasc.errors import InputError

STRIDES = (4, 8, 16)  # of the features that are added up
STRIDE = STRIDES[0]  # px of the field per cell of the map
MULTIPLE = STRIDES[-1]  # px: sides of what the network takes, and steps between windows, are multiples of it
READS = ((1,), STRIDES[:1], STRIDES[1:2], STRIDES)  # px per cell of the maps that each step takes; 1: the field
GIVES = (*STRIDES, STRIDE)  # px per cell of the map that each makes
WIDTH = 48  # channels that the features are brought to
FITTING = "tf_efficientnet_lite0 or resnet18"  # named where another backbone is refused
RARE = 0.01  # p(mitosis) that an untrained head gives a cell
HALO = 192  # px: nothing farther from a cell than this changes it (EfficientNet-Lite0, ResNet18)
WINDOWS = (352, 704, 1376, 736)  # px per step: side of what a core computes at once, without its halo; larger: more
# leaves the core's cache; smaller: more is computed twice


@dataclass(frozen=True)
class Step:
    """A step of a first look.

    network: maps (B, C, h, w) to one map. reads: px of the field per cell of each map that it takes. gives: px per cell
    of the map that it makes. channels: of that map. halo: px, a multiple of MULTIPLE: nothing farther away changes a
    cell. window: px, side of what a core computes at once, without its halo.
    """

    network: nn.Module
    reads: tuple[int, ...]
    gives: int
    channels: int
    halo: int
    window: int


class FirstLook(nn.Module):
    """Fields (B, 3, H, W), float in 0..1, RGB, to log odds of a centre (B, H / 4, W / 4); H, W multiples of MULTIPLE.

    backbone: name of a timm model with feature maps at STRIDES; its weights are random.
    Raises: InputError: a backbone without these, or one that sees farther than HALO, as squeeze-and-excitation does.
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone_name = backbone
        with torch.device("meta"):
            strides = timm.create_model(backbone, features_only=True).feature_info.reduction()
        if not {*STRIDES} <= {*strides}:
            raise InputError(
                f"backbone {backbone}: has feature maps at strides {strides}; a first look needs {STRIDES}"
            )
        indices = tuple(strides.index(stride) for stride in STRIDES)
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=indices)
        if hasattr(self.backbone, "blocks"):  # of an EfficientNet timm keeps, and computes, what comes after the last
            del self.backbone.blocks[self.backbone.feature_info.get_dicts()[-1]["stage"] :]
        elif not isinstance(self.backbone, nn.ModuleDict):
            raise InputError(f"backbone {backbone}: its layers are not in a row; a first look needs {FITTING}")
        _pad_by_stride(self.backbone)
        config, self.channels = self.backbone.pretrained_cfg, self.backbone.feature_info.channels()
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.lateral = nn.ModuleList(nn.Conv2d(each, WIDTH, kernel_size=1) for each in self.channels)
        last = nn.Conv2d(WIDTH, 1, kernel_size=1)
        nn.init.constant_(last.bias, float(np.log(RARE / (1 - RARE))))
        first = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
        self.head = nn.Sequential(first, nn.BatchNorm2d(WIDTH), nn.ReLU(), last)
        if _reach(self, {1: 3}) > HALO:
            raise InputError(
                f"backbone {backbone}: sees farther than {HALO} px, as squeeze-and-excitation does; a first look needs "
                f"one without, such as {FITTING}"
            )
        of = {1: 3} | dict(zip(STRIDES, self.channels, strict=True))  # channels by px per cell
        self._halos = [
            _reach(part, {px: of[px] for px in reads}) for part, reads in zip(self._parts(), READS, strict=True)
        ]

    def steps(self) -> list[Step]:
        """What makes its map of a field: a map at each of STRIDES from the one before, then the log odds from all."""
        columns = self._parts(), READS, GIVES, [*self.channels, 1], self._halos, WINDOWS
        return [Step(*each) for each in zip(*columns, strict=True)]

    def forward(self, fields: Tensor) -> Tensor:
        *parts, last = self._parts()
        maps = [fields]
        for part in parts:
            maps.append(part(maps[-1]))
        return last(*maps[1:])[:, 0]

    def _parts(self) -> list[nn.Module]:
        """The networks of the steps. They are made anew: a module that holds them twice would save them twice."""
        if isinstance(self.backbone, nn.ModuleDict):
            layers = [*self.backbone.values()]
            ends = [place for place, name in enumerate(self.backbone, start=1) if name in self.backbone.return_layers]
        else:
            layers = [self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks]
            ends = [2 + each["stage"] for each in self.backbone.feature_info.get_dicts()]
        first, *others = (nn.Sequential(*layers[start:end]) for start, end in zip([0, *ends], ends, strict=False))
        return [nn.Sequential(_Normalise(self.mean, self.std), *first), *others, _TopDown(self.lateral, self.head)]


class _Normalise(nn.Module):
    """Fields (B, 3, H, W) in 0..1 as a backbone takes them."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, fields: Tensor) -> Tensor:
        return (fields - self.mean) / self.std


class _TopDown(nn.Module):
    """Features at STRIDES, finest first, to log odds (B, 1, h, w)."""

    def __init__(self, lateral: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.lateral, self.head = lateral, head

    def forward(self, *features: Tensor) -> Tensor:
        *finer, total = (lateral(each) for lateral, each in zip(self.lateral, features, strict=True))
        for each in reversed(finer):
            total = each + F.interpolate(total, scale_factor=2.0, mode="nearest")
        return self.head(total)


class _PaddedByStride(nn.Conv2d):
    """TensorFlow's padding of maps whose sides are multiples of the stride: the same for all, as timm's is not.

    OpenVINO then pads within the convolution; where it has to ask for the sides it writes a padded map first.
    """

    def forward(self, maps: Tensor) -> Tensor:
        pads = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max(0, (kernel - 1) * dilation + 1 - stride)
            pads = [total // 2, total - total // 2, *pads]  # the last axis first
        return F.conv2d(F.pad(maps, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _pad_by_stride(network: nn.Module) -> None:
    """Let the convolutions of a network that pad as TensorFlow does pad by their stride alone."""
    for module in network.modules():
        if isinstance(module, Conv2dSame):
            module.__class__ = _PaddedByStride  # its weights and settings stay


@torch.enable_grad()
def _reach(network: nn.Module, channels: dict[int, int]) -> int:
    """How far away may lie what changes a cell: px, a multiple of MULTIPLE, above HALO where it is farther than that.

    It is found by gradients of a copy whose weights are positive and small: no path through it is cut off by an
    activation, or by a batch norm that begins with 0.

    channels: of each map that the network takes, by px of the field per cell.
    """
    draws, probe = torch.Generator().manual_seed(0), copy.deepcopy(network).double().eval()
    for name, parameter in probe.named_parameters():
        weights = torch.rand(parameter.shape, generator=draws) + 0.5
        if parameter.dim() > 1:
            weights /= 4 * weights[0].numel()
        parameter.data.copy_(torch.full_like(weights, 0.5) if name.endswith("bias") else weights)
    middle = HALO + MULTIPLE
    maps = [
        (1 + torch.rand(1, number, MULTIPLE // px, (2 * middle + MULTIPLE) // px, generator=draws)).double()
        for px, number in channels.items()
    ]
    made = probe(*(each.requires_grad_() for each in maps))
    cells = made.shape[-1] * middle // (2 * middle + MULTIPLE)
    reach = 0
    for px, gradient in zip(channels, torch.autograd.grad(made[..., cells:-cells].sum(), maps), strict=True):
        changing = gradient.abs().flatten(0, 2).sum(dim=0).nonzero()[:, 0] * px
        reach = max(reach, middle - int(changing.min()), int(changing.max()) + px - middle - MULTIPLE)
    return -(-reach // MULTIPLE) * MULTIPLE


def focal_loss(odds: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Focal loss on centres, summed and divided by the number of centres: a scalar.

    odds: (B, h, w). wanted: (B, h, w), 1 at centres, falling to 0 round them: the nearer, the less a high p costs.
    counts: (B, h, w) bool, the cells that count.
    """
    p, centre = odds.sigmoid(), wanted >= 1
    missed, false = (1 - p) ** 2 * F.logsigmoid(odds), (1 - wanted) ** 4 * p**2 * F.logsigmoid(-odds)
    return -(torch.where(centre, missed, false) * counts).sum() / (centre & counts).sum().clamp(min=1)
