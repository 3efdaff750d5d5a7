"""The first look: a small network that goes over a whole field once and says where mitoses may be.

It sees a field at the resolution at which candidates are searched, and gives a map of log odds, one cell per STRIDE px.
Features of a timm backbone at three strides are added up at the finest, as in a feature pyramid (Lin et al. 2017). The
loss is the focal loss on centres of CornerNet and CenterNet (Law & Deng 2018, Zhou et al. 2019).
"""

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasc.errors import InputError
from dasc.model.augment import to_float
from dasc.model.inference import device_of, on_cores
from dasc.model.transfer import upload

STRIDES = (4, 8, 16)  # of the features that are added up
STRIDE = STRIDES[0]  # px of the field per cell of the map
MULTIPLE = STRIDES[-1]  # px: sides of what the network takes, and steps between windows, are multiples of it
WIDTH = 48  # channels that the features are brought to
RARE = 0.01  # p(mitosis) that an untrained head gives a cell
HALO = 192  # px: nothing farther from a cell than this changes it (EfficientNet-Lite0, ResNet18)
WINDOW = 1024  # px: side of what a core computes at once, without its halo; with it 0.6 GB


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
        config, channels = self.backbone.pretrained_cfg, self.backbone.feature_info.channels()
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.lateral = nn.ModuleList(nn.Conv2d(each, WIDTH, kernel_size=1) for each in channels)
        last = nn.Conv2d(WIDTH, 1, kernel_size=1)
        nn.init.constant_(last.bias, float(np.log(RARE / (1 - RARE))))
        first = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
        self.head = nn.Sequential(first, nn.BatchNorm2d(WIDTH), nn.ReLU(), last)
        self._check_halo()

    @torch.enable_grad()
    def _check_halo(self) -> None:
        """Raise InputError where a cell depends on what lies farther away than HALO: windows would differ at seams."""
        field = torch.rand(1, 3, MULTIPLE, HALO + 4 * MULTIPLE, requires_grad=True)
        training = self.training
        (seen,) = torch.autograd.grad(self.eval()(field)[..., 0].sum(), field)
        self.train(training)
        if seen[..., HALO + STRIDE :].any():
            raise InputError(
                f"backbone {self.backbone_name}: sees farther than {HALO} px, as squeeze-and-excitation does; a first "
                "look needs one without, such as tf_efficientnet_lite0 or resnet18"
            )

    def forward(self, fields: Tensor) -> Tensor:
        features = self.backbone((fields - self.mean) / self.std)
        *finer, total = (lateral(each) for lateral, each in zip(self.lateral, features, strict=True))
        for each in reversed(finer):
            total = each + F.interpolate(total, scale_factor=2.0, mode="nearest")
        return self.head(total)[:, 0]


def focal_loss(odds: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Focal loss on centres, summed and divided by the number of centres: a scalar.

    odds: (B, h, w). wanted: (B, h, w), 1 at centres, falling to 0 round them: the nearer, the less a high p costs.
    counts: (B, h, w) bool, the cells that count.
    """
    p, centre = odds.sigmoid(), wanted >= 1
    missed, false = (1 - p) ** 2 * F.logsigmoid(odds), (1 - wanted) ** 4 * p**2 * F.logsigmoid(-odds)
    return -(torch.where(centre, missed, false) * counts).sum() / (centre & counts).sum().clamp(min=1)


def odds_map(network: nn.Module, field: np.ndarray, cores: int = 1) -> np.ndarray:
    """Log odds (ceil(H / STRIDE), ceil(W / STRIDE)) float32 of a field (H, W, 3) uint8, window by window.

    cores: threads that compute windows side by side, on a CPU.
    """
    height, width = field.shape[:2]
    device = device_of(network)
    framed = cv2.copyMakeBorder(field, 0, -height % MULTIPLE, 0, -width % MULTIPLE, cv2.BORDER_REFLECT)
    framed = upload(torch.from_numpy(framed), device)
    odds = torch.empty(framed.shape[0] // STRIDE, framed.shape[1] // STRIDE, device=device)
    places = [(row, column) for row in _parts(framed.shape[0]) for column in _parts(framed.shape[1])]

    def compute(place: tuple[slice, slice]) -> None:
        rows, columns = place
        top, left = max(0, rows.start - HALO), max(0, columns.start - HALO)
        cells = _odds_of(network, framed[top : rows.stop + HALO, left : columns.stop + HALO])
        odds[_cells(rows, 0), _cells(columns, 0)] = cells[_cells(rows, top), _cells(columns, left)]

    with on_cores(min(cores, len(places))) as each:
        each(compute, places)
    return odds[: -(-height // STRIDE), : -(-width // STRIDE)].cpu().numpy()


def _parts(side: int) -> list[slice]:
    """A side (px, a multiple of MULTIPLE) in equal parts of WINDOW px at most."""
    step = -(-side // -(-side // WINDOW) // MULTIPLE) * MULTIPLE
    return [slice(start, min(start + step, side)) for start in range(0, side, step)]


def _cells(part: slice, start: int) -> slice:
    """The cells of a part of a side, px, counted from `start`."""
    return slice((part.start - start) // STRIDE, (part.stop - start) // STRIDE)


@torch.inference_mode()
def _odds_of(network: nn.Module, field: Tensor) -> Tensor:
    """Log odds (h, w) of a field (H, W, 3) uint8 on the network's device, its sides multiples of MULTIPLE."""
    try:
        with torch.autocast(field.device.type, torch.bfloat16, enabled=field.is_cuda):
            return network(to_float(field.permute(2, 0, 1)[None]))[0].float()
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory does not hold a window of the field; use --device cpu") from error


def peaks(odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The peaks of a map (h, w): points (N, 2), x and y in px of the field, and their log odds (N,), highest first.

    A peak is not below its eight neighbours and above one of them. It lies where parabolas through it and its
    neighbours are highest, at most half a cell away.
    """
    square = np.ones((3, 3), np.uint8)
    row, column = np.nonzero((odds >= cv2.dilate(odds, square)) & (odds > cv2.erode(odds, square)))
    order = np.argsort(-odds[row, column], kind="stable")
    row, column = row[order], column[order]
    framed = np.pad(odds, 1, mode="edge")
    beside = (
        (framed[row + 1, column], framed[row + 1, column + 2]),
        (framed[row, column + 1], framed[row + 2, column + 1]),
    )
    peak, cells = odds[row, column], np.stack([column, row], axis=1).astype(float)
    for axis, (before, after) in enumerate(beside):
        bend = np.maximum(2 * peak - before - after, 1e-6)
        cells[:, axis] += np.clip((after - before) / (2 * bend), -0.5, 0.5)
    return cells * STRIDE + (STRIDE - 1) / 2, peak
