"""Random views of patches, drawn per patch and computed for the whole batch on the device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Optical densities of hematoxylin, eosin and the rest for red, green and blue, one stain per row, unit length
# (Ruifrok & Johnston 2001; the third row is orthogonal to the other two).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, -0.570, 0.776]])


def to_float(patches: Tensor) -> Tensor:
    """Patches (B, 3, H, W) uint8 to float in 0..1, laid out as convolutions like them."""
    return patches.float().div_(255).to(memory_format=torch.channels_last)


def dihedral(patches: Tensor, view: int) -> Tensor:
    """View 0..7 of patches (B, C, S, S): view % 4 quarter turns, mirrored from view 4 on."""
    patches = patches.flip(3) if view >= 4 else patches
    return torch.rot90(patches, view % 4, dims=(2, 3))


def affine(patches: Tensor, generator: torch.Generator, degrees: float, scale: float, shift: float) -> Tensor:
    """Turn, mirror, scale and shift each patch (B, 3, S, S); what comes in from outside is mirrored at its edge.

    Args:
        degrees: largest angle either way. scale: largest relative change of size. shift: in parts of the side.
    """
    return warp(patches, affine_matrices(patches, generator, degrees, scale, shift))


def affine_matrices(patches: Tensor, generator: torch.Generator, degrees: float, scale: float, shift: float) -> Tensor:
    """A random matrix per patch, (B, 2, 3): from a place in the view to its place in the patch, both in -1..1."""
    angle, size, x, y, mirror = _uniform(patches, generator, 5)
    angle, size, mirror = angle * math.radians(degrees), 1 + size * scale, mirror.sign()
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.stack([cos * mirror, -sin, 2 * shift * x, sin * mirror, cos, 2 * shift * y], dim=1).view(-1, 2, 3)


def warp(patches: Tensor, matrices: Tensor) -> Tensor:
    """The views (B, 3, S, S) of patches that `affine_matrices` describe."""
    grid = F.affine_grid(matrices, list(patches.shape), align_corners=False)
    views = F.grid_sample(patches, grid, padding_mode="reflection", align_corners=False)
    return views.to(memory_format=torch.channels_last)  # grid_sample loses it, and convolutions are slow without


def warp_points(points_px: Tensor, matrices: Tensor, side: int) -> Tensor:
    """Where points (B, 2; x and y in px) of patches lie in the views that `warp` makes; NaN stays NaN."""
    places = (points_px + 0.5) * (2 / side) - 1 - matrices[:, :, 2]
    return (torch.linalg.solve(matrices[:, :, :2], places) + 1) * (side / 2) - 0.5


def jitter_stain(patches: Tensor, generator: torch.Generator, strength: float, offset: float) -> Tensor:
    """Change how much of each stain a patch (B, 3, H, W; 0..1) took up, as another laboratory or scanner would.

    In optical density the amount of every stain is multiplied by 1 +- strength and moved by +- offset
    (Tellez et al. 2018), which for a pixel is one 3x3 matrix and one shift.
    """
    stains = STAINS.to(patches)
    factors = 1 + strength * _uniform(patches, generator, 3).T  # (B, 3)
    moves = offset * _uniform(patches, generator, 3).T
    matrices = torch.linalg.inv(stains) @ (factors[:, :, None] * stains)  # (B, 3, 3), to the right of a pixel's row
    pixels = patches.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, 3), without a copy where the layout is channels_last
    minus_density = pixels.clamp(min=1 / 255).log_()
    mixed = torch.baddbmm(-(moves @ stains)[:, None], minus_density, matrices).exp_().clamp_(0, 1)
    return mixed.unflatten(1, patches.shape[2:]).permute(0, 3, 1, 2)


def jitter_light(patches: Tensor, generator: torch.Generator, brightness: float, contrast: float) -> Tensor:
    """Multiply each patch's contrast about its mean by 1 +- contrast and its brightness by 1 +- brightness."""
    light, spread = _uniform(patches, generator, 2).view(2, -1, 1, 1, 1)
    mean = patches.mean(dim=(1, 2, 3), keepdim=True)
    # (x - mean) (1 + contrast) + mean (1 + brightness), gathered so that the pixels are passed over once
    return torch.addcmul(mean * (brightness * light - contrast * spread), patches, 1 + contrast * spread).clamp_(0, 1)


def jitter_focus(patches: Tensor, generator: torch.Generator, blur: float, sharpen: float) -> Tensor:
    """Mix each patch with its 5x5 binomial blur: from `sharpen` times the detail added to `blur` times removed."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=patches.device) / 16
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(patches, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    share = _uniform(patches, generator, 1).view(-1, 1, 1, 1)
    share = torch.where(share > 0, share * blur, share * sharpen)
    return torch.lerp(patches, blurred, share).clamp_(0, 1)


def _uniform(patches: Tensor, generator: torch.Generator, rows: int) -> Tensor:
    """Numbers in -1..1, (rows, B). Drawn on the CPU, so that every device sees the same views."""
    return (torch.rand(rows, len(patches), generator=generator) * 2 - 1).to(patches.device)


def training_view(patches: Tensor, generator: torch.Generator, stain: float, light: float, focus: float) -> Tensor:
    """One random view of every patch (B, 3, S, S) uint8 for training: float in 0..1, the same shape.

    Args:
        stain, light, focus: strengths of `jitter_stain`, `jitter_light` and `jitter_focus`; 0 leaves that one out.
    """
    return _training_view(patches, generator, stain, light, focus)[0]


def located_view(
    patches: Tensor, points_px: Tensor, generator: torch.Generator, stain: float, light: float, focus: float
) -> tuple[Tensor, Tensor]:
    """As `training_view`, and where points (B, 2; x and y in px, NaN for none) of the patches lie in the views."""
    views, matrices = _training_view(patches, generator, stain, light, focus)
    return views, warp_points(points_px, matrices, patches.shape[-1])


def _training_view(patches, generator, stain, light, focus) -> tuple[Tensor, Tensor]:
    matrices = affine_matrices(patches, generator, degrees=180, scale=0.15, shift=0.05)
    views = warp(to_float(patches), matrices)
    if stain:
        views = jitter_stain(views, generator, stain, stain / 4)
    if light:
        views = jitter_light(views, generator, light, light)
    if focus:
        views = jitter_focus(views, generator, focus, focus / 2)
    return views, matrices
