"""Random views of patches: drawn per patch on the CPU, computed for the whole batch on its device."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dasc.model.draws import Draws, rand
from dasc.model.transfer import upload, upload_all

# Optical densities of hematoxylin, eosin and the rest for red, green and blue, one stain per row, unit length
# (Ruifrok & Johnston 2001; the third row is orthogonal to the other two).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, -0.570, 0.776]])

CACHED = 8  # patches that a core changes together: what it reads and writes then stays in its cache


def to_float(patches: Tensor) -> Tensor:
    """Patches (B, 3, H, W) uint8 to float in 0..1, laid out as convolutions like them."""
    return patches.float().div_(255).to(memory_format=torch.channels_last)


def dihedral(patches: Tensor, view: int) -> Tensor:
    """View 0..7 of patches (B, C, S, S): view % 4 quarter turns, mirrored from view 4 on."""
    patches = patches.flip(3) if view >= 4 else patches
    return torch.rot90(patches, view % 4, dims=(2, 3))


def affine(patches: Tensor, generator: Draws, degrees: float, scale: float, shift: float) -> Tensor:
    """Turn, mirror, scale and shift each patch (B, 3, S, S); what comes in from outside is mirrored at its edge.

    Args:
        degrees: largest angle either way. scale: largest relative change of size. shift: in parts of the side.
    """
    return _changed(patches, warp, affine_matrices(patches, generator, degrees, scale, shift))


def affine_matrices(patches: Tensor, generator: Draws, degrees: float, scale: float, shift: float) -> Tensor:
    """A random matrix per patch, (B, 2, 3): from a place in the view to its place in the patch, both in -1..1."""
    angle, size, x, y, mirror = _uniform(patches, generator, 5)
    angle, size, mirror = angle * math.radians(degrees), 1 + size * scale, mirror.sign()
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.stack([cos * mirror, -sin, 2 * shift * x, sin * mirror, cos, 2 * shift * y], dim=1).view(-1, 2, 3)


def warp(patches: Tensor, matrices: Tensor) -> Tensor:
    """The views (B, 3, S, S) of patches that `affine_matrices` describe."""
    height, width = ((2 * torch.arange(side, device=patches.device) + 1) / side - 1 for side in patches.shape[2:])
    # x and y of every pixel: one outer sum, where F.affine_grid multiplies a matrix per pixel
    across, down = matrices[:, None, :, 0] * width[:, None], matrices[:, None, :, 1] * height[:, None]
    grid = across[:, None] + (down + matrices[:, None, :, 2])[:, :, None]
    return F.grid_sample(patches, grid, padding_mode="reflection", align_corners=False)


def warp_points(points_px: Tensor, matrices: Tensor, side: int) -> Tensor:
    """Where points (B, 2; x and y in px) of patches lie in the views that `warp` makes; NaN stays NaN."""
    places = (points_px + 0.5) * (2 / side) - 1 - matrices[:, :, 2]
    return (torch.linalg.solve(matrices[:, :, :2], places) + 1) * (side / 2) - 0.5


def jitter_stain(patches: Tensor, generator: Draws, strength: float, offset: float) -> Tensor:
    """Change how much of each stain a patch (B, 3, H, W; 0..1) took up, as another laboratory or scanner would.

    In optical density the amount of every stain is multiplied by 1 +- strength and moved by +- offset
    (Tellez et al. 2018), which for a pixel is one 3x3 matrix and one shift.
    """
    return _changed(patches, mix_stains, *stain_mixtures(patches, generator, strength, offset))


def stain_mixtures(patches: Tensor, generator: Draws, strength: float, offset: float) -> tuple[Tensor, Tensor]:
    """A random matrix (B, 3, 3) and shift (B, 3) per patch, for the logarithms of red, green and blue."""
    factors = 1 + strength * _uniform(patches, generator, 3).T  # (B, 3)
    moves = offset * _uniform(patches, generator, 3).T
    return (torch.linalg.inv(STAINS) @ (factors[:, :, None] * STAINS)).mT, -(moves @ STAINS)


def mix_stains(patches: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """The patches (B, 3, H, W; 0..1) whose stains `stain_mixtures` describe."""
    minus_density = patches.clamp(min=1 / 255).log_().flatten(2)
    return torch.baddbmm(shifts[:, :, None], matrices, minus_density).exp_().clamp_(0, 1).view(patches.shape)


def jitter_light(patches: Tensor, generator: Draws, brightness: float, contrast: float) -> Tensor:
    """Multiply each patch's contrast about its mean by 1 +- contrast and its brightness by 1 +- brightness."""
    return _changed(patches, relight, *light_changes(patches, generator, brightness, contrast))


def light_changes(patches: Tensor, generator: Draws, brightness: float, contrast: float) -> tuple[Tensor, Tensor]:
    """A random relative change of brightness and of contrast per patch, (B, 1, 1, 1) each."""
    light, spread = _uniform(patches, generator, 2).view(2, -1, 1, 1, 1)
    return brightness * light, contrast * spread


def relight(patches: Tensor, light: Tensor, spread: Tensor) -> Tensor:
    """The patches (B, 3, H, W; 0..1) with these changes of `light_changes`."""
    mean = patches.mean(dim=(1, 2, 3), keepdim=True)
    # (x - mean) (1 + spread) + mean (1 + light), gathered so that the pixels are passed over once
    return torch.addcmul(mean * (light - spread), patches, 1 + spread).clamp_(0, 1)


def jitter_focus(patches: Tensor, generator: Draws, blur: float, sharpen: float) -> Tensor:
    """Mix each patch with its 5x5 binomial blur: from `sharpen` times the detail added to `blur` times removed."""
    return _changed(patches, refocus, focus_shares(patches, generator, blur, sharpen))


def focus_shares(patches: Tensor, generator: Draws, blur: float, sharpen: float) -> Tensor:
    """A random share of the fine detail to remove per patch, (B, 1, 1, 1); below 0 it is added."""
    share = _uniform(patches, generator, 1).view(-1, 1, 1, 1)
    return torch.where(share > 0, share * blur, share * sharpen)


def refocus(patches: Tensor, shares: Tensor) -> Tensor:
    """The patches (B, 3, H, W; 0..1) with these shares of their 5x5 binomial blur."""
    blurred = F.pad(patches, (2, 2, 2, 2), mode="reflect")
    for axis in (3, 2):  # sums of shifted pictures: a convolution of three channels is several times slower
        a, b, c, d, e = (blurred.narrow(axis, start, patches.shape[axis]) for start in range(5))
        blurred = torch.add(a + e, b + d, alpha=4).add_(c, alpha=6).mul_(1 / 16)
    return torch.lerp(patches, blurred, shares).clamp_(0, 1)


def _uniform(patches: Tensor, generator: Draws, rows: int) -> Tensor:
    """Numbers in -1..1, (rows, B), on the CPU."""
    return rand(generator, (rows, len(patches)), axis=1) * 2 - 1


def _changed(patches: Tensor, change: Callable[..., Tensor], *drawn: Tensor) -> Tensor:
    """A change of patches with what was drawn for it."""
    return change(patches, *(upload(of_patch, patches.device) for of_patch in drawn))


def training_view(patches: Tensor, generator: Draws, stain: float, light: float, focus: float) -> Tensor:
    """One random view of every patch (B, 3, S, S) uint8 for training: float in 0..1, the same shape.

    Args:
        stain, light, focus: strengths of `jitter_stain`, `jitter_light` and `jitter_focus`; 0 leaves that one out.
    """
    return _training_view(patches, generator, stain, light, focus)[0]


def located_view(
    patches: Tensor, points_px: Tensor, generator: Draws, stain: float, light: float, focus: float
) -> tuple[Tensor, Tensor]:
    """As `training_view`, and where points (B, 2; x and y in px, NaN for none) of the patches lie in the views.

    points_px: on the CPU, as every small system of equations is solved there; returned on the patches' device.
    """
    views, matrices = _training_view(patches, generator, stain, light, focus)
    return views, upload(warp_points(points_px, matrices, patches.shape[-1]), patches.device)


def _training_view(patches, generator, stain, light, focus) -> tuple[Tensor, Tensor]:
    matrices = affine_matrices(patches, generator, degrees=180, scale=0.15, shift=0.05)
    changes = [(warp, (matrices,))]
    if stain:
        changes.append((mix_stains, stain_mixtures(patches, generator, stain, stain / 4)))
    if light:
        changes.append((relight, light_changes(patches, generator, light, light)))
    if focus:
        changes.append((refocus, (focus_shares(patches, generator, focus, focus / 2),)))
    there = iter(upload_all([one for _, drawn in changes for one in drawn], patches.device))
    changes = [(change, [next(there) for _ in drawn]) for change, drawn in changes]
    views = torch.empty(patches.shape, device=patches.device, memory_format=torch.channels_last)
    at_once = CACHED * torch.get_num_threads() if patches.device.type == "cpu" else max(1, len(patches))
    for start in range(0, len(patches), at_once):
        part = slice(start, start + at_once)
        view = patches[part].float().div_(255)
        for change, drawn in changes:
            view = change(view, *(of_patch[part] for of_patch in drawn))
        views[part] = view
    return views, matrices
