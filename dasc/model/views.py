"""Weak and strong views of stage 4: drawn per patch, computed for the whole batch on its device.

The ranges are the paper's; where it gives none they are ours. `strength` scales them all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dasc.model.augment import affine, jitter_light, jitter_stain, to_float
from dasc.model.draws import Draws, in_two, rand
from dasc.model.transfer import upload

# Red, green and blue to luma and two chroma axes (NTSC 1953): a change of hue is a turn of the chroma.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
ELASTIC_PX = 2.0  # largest shift of a control point of the strong view's deformation
ELASTIC_CELL_PX = 16  # distance of the control points
BLUR_PX = 1.0  # largest sigma of the strong view's Gaussian blur


def weak_view(patches: Tensor, generator: Draws, strength: float = 1.0) -> Tensor:
    """A weakly changed view of each patch (B, 3, S, S) uint8: float in 0..1, the same shape.

    Flips, 5 degrees, 5 % of size and place, brightness and contrast 0.2, saturation and hue 0.1.
    """
    views = to_float(turn(patches, generator, quarter=False))
    views = affine(views, generator, degrees=5 * strength, scale=0.05 * strength, shift=0.05 * strength)
    views = jitter_light(views, generator, 0.2 * strength, 0.2 * strength)
    return jitter_colour(views, generator, 0.1 * strength, 0.1 * strength)


def strong_view(patches: Tensor, generator: Draws, strength: float = 1.0) -> Tensor:
    """A strongly changed view of each patch (B, 3, S, S) uint8: float in 0..1, the same shape.

    Flip or right-angle turn, elastic deformation, brightness 0.65-1.35, contrast 0.5-1.5, then for half of the
    patches saturation 0-2 with hue 0.3, for the others hematoxylin-eosin jitter 0.05, then Gaussian blur.
    """
    views = elastic(to_float(turn(patches, generator, quarter=True)), generator, ELASTIC_PX * strength, ELASTIC_CELL_PX)
    views = jitter_light(views, generator, 0.35 * strength, 0.5 * strength)
    (coloured, of_coloured), (stained, of_stained) = in_two(generator, len(patches))
    coloured, stained = (upload(mask.nonzero()[:, 0], views.device) for mask in (coloured, stained))
    views[coloured] = jitter_colour(views[coloured], of_coloured, 1.0 * strength, 0.3 * strength)
    views[stained] = jitter_stain(views[stained], of_stained, 0.05 * strength, 0.05 * strength)
    return blur(views, generator, BLUR_PX * strength)


def turn(patches: Tensor, generator: Draws, quarter: bool) -> Tensor:
    """Mirror each patch (B, C, S, S) or not along either axis, and with `quarter` turn it by 90 degrees or not."""
    for change in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3))[: 3 if quarter else 2]:
        drawn = rand(generator, (len(patches), 1, 1, 1)) < 0.5
        patches = torch.where(upload(drawn, patches.device), change(patches), patches)
    return patches


def elastic(patches: Tensor, generator: Draws, amplitude_px: float, cell_px: int) -> Tensor:
    """Deform each patch (B, C, S, S; float) smoothly; what comes in from outside is mirrored at its edge.

    Control points on a square grid are shifted by up to amplitude_px in x and y, the pixels between them bicubically
    (Simard et al. 2003 smooth random shifts with a Gaussian instead).
    """
    number, _, side, _ = patches.shape
    points = -(-side // cell_px) + 1
    shifts = upload(_uniform(generator, (number, 2, points, points)) * (amplitude_px * 2 / side), patches.device)
    if not number:  # of a batch of fewer patches than processes
        return patches
    shifts = F.interpolate(shifts, size=(side, side), mode="bicubic", align_corners=True)
    still = torch.eye(2, 3, device=patches.device).expand(number, 2, 3)
    grid = F.affine_grid(still, list(patches.shape), align_corners=False) + shifts.permute(0, 2, 3, 1)
    return F.grid_sample(patches, grid, padding_mode="reflection", align_corners=False)


def jitter_colour(patches: Tensor, generator: Draws, saturation: float, hue: float) -> Tensor:
    """Multiply each patch's saturation by 1 +- saturation and turn its hue by up to `hue` of the whole circle.

    In the YIQ space this is for a pixel one 3x3 matrix; grey stays grey and luma stays what it is.
    """
    factor, angle = _uniform(generator, (2, len(patches)), axis=1)
    factor, angle = (1 + saturation * factor).clamp(min=0), 2 * math.pi * hue * angle
    cos, sin, none = factor * angle.cos(), factor * angle.sin(), torch.zeros_like(angle)
    chroma = torch.stack([torch.ones_like(angle), none, none, none, cos, -sin, none, sin, cos], dim=1).view(-1, 3, 3)
    matrices = upload(torch.linalg.inv(YIQ) @ chroma @ YIQ, patches.device)
    return torch.einsum("bchw,bdc->bdhw", patches, matrices).clamp_(0, 1)


def blur(patches: Tensor, generator: Draws, largest_px: float) -> Tensor:
    """Gaussian blur of each patch (B, C, S, S; float), sigma between 0 and largest_px, weights cut at the edge.

    Along each axis a blur is a band matrix, so that a whole batch of different sigmas is two batched products.
    """
    side = patches.shape[-1]
    sigma = upload(largest_px * (_uniform(generator, (len(patches), 1, 1, 1)) + 1) / 2, patches.device)
    place = torch.arange(side, device=patches.device)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / sigma.clamp(min=1e-3)).square())
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights @ patches @ weights.mT).contiguous(memory_format=torch.channels_last)


def _uniform(generator: Draws, shape: tuple[int, ...], axis: int = 0) -> Tensor:
    """Numbers in -1..1, drawn on the CPU; `axis` counts the patches."""
    return rand(generator, shape, axis) * 2 - 1
