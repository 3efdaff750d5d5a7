"""Random views stay pictures of the same patch."""

import torch
import torch.nn.functional as F

from dasc.model import augment
from dasc.model.augment import (
    affine,
    affine_matrices,
    dihedral,
    jitter_focus,
    jitter_light,
    jitter_stain,
    located_view,
    refocus,
    to_float,
    training_view,
    warp,
    warp_points,
)


def patches(number: int = 6, side: int = 32) -> torch.Tensor:
    return torch.randint(40, 220, (number, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_views_have_the_same_shape_and_range_and_differ():
    source = patches()
    views = training_view(source, generator(), 0.2, 0.2, 0.8)
    assert views.shape == source.shape and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert not torch.allclose(views, to_float(source), atol=0.05)


def test_same_generator_same_views():
    first, second = (training_view(patches(), generator(), 0.2, 0.2, 0.8) for _ in range(2))
    assert torch.equal(first, second)


def test_views_do_not_depend_on_how_many_are_made_together(monkeypatch):
    source = patches(50)
    views = training_view(source, generator(), 0.2, 0.2, 0.8)
    monkeypatch.setattr(augment, "CACHED", 3)
    assert torch.allclose(training_view(source, generator(), 0.2, 0.2, 0.8), views, atol=1e-5)


def test_warp_is_torchs_affine_grid():
    source = to_float(patches())
    matrices = affine_matrices(source, generator(), 180, 0.15, 0.05)
    grid = F.affine_grid(matrices, list(source.shape), align_corners=False)
    expected = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    assert torch.allclose(warp(source, matrices), expected, atol=1e-4)


def test_focus_is_a_binomial_convolution():
    source = to_float(patches())
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(source, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    assert torch.allclose(refocus(source, torch.ones(len(source), 1, 1, 1)), blurred, atol=1e-6)


def test_strength_zero_changes_nothing():
    source = to_float(patches())
    assert torch.allclose(affine(source, torch.Generator().manual_seed(0), 0, 0, 0).sum(), source.sum(), rtol=1e-4)
    assert torch.allclose(jitter_stain(source, generator(), 0, 0), source, atol=1e-5)
    assert torch.allclose(jitter_light(source, generator(), 0, 0), source, atol=1e-6)
    assert torch.allclose(jitter_focus(source, generator(), 0, 0), source, atol=1e-6)


def test_every_patch_gets_its_own_view():
    same = patches(1).expand(8, -1, -1, -1)
    for view in (
        affine(to_float(same), generator(), 180, 0.1, 0.1),
        jitter_stain(to_float(same), generator(), 0.3, 0.1),
        jitter_light(to_float(same), generator(), 0.3, 0.3),
        jitter_focus(to_float(same), generator(), 0.8, 0.4),
    ):
        assert len({tuple(patch.flatten()[:50].tolist()) for patch in view}) == 8


def test_dihedral_views_are_eight_and_distinct():
    source = to_float(patches(1))
    views = [dihedral(source, view) for view in range(8)]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    for view in views:
        assert torch.allclose(view.sum(), source.sum())


def test_mirrored_and_turned_keep_the_centre_dark():
    source = torch.full((16, 3, 33, 33), 220, dtype=torch.uint8)
    source[:, :, 14:19, 14:19] = 20
    views = affine(to_float(source), generator(), 180, 0.1, 0.0)
    assert (views[:, :, 16, 16] < 0.2).all() and (views[:, :, 2, 2] > 0.7).all()


def test_more_stain_is_darker():
    """Stain strengths multiply optical density: doubled twice over, every pixel gets darker."""
    source = to_float(patches(64))
    views = jitter_stain(source, generator(), 0.5, 0.0)
    density, changed = (-(image.clamp(min=1 / 255)).log().mean(dim=(1, 2, 3)) for image in (source, views))
    assert (changed / density).std() > 0.05 and 0.4 < (changed / density).min() < (changed / density).max() < 1.6


def test_points_move_with_their_patch():
    """A bright dot drawn at the point is found again where the moved point lies."""
    source, points = torch.zeros(16, 3, 64, 64), 20 + 24 * torch.rand(16, 2, generator=generator())
    points = points.round()
    for patch, (x, y) in zip(source, points.long(), strict=True):
        patch[:, y - 1 : y + 2, x - 1 : x + 2] = 1
    matrices = affine_matrices(source, generator(), 180, 0.15, 0.05)
    views, moved = warp(source, matrices)[:, 0], warp_points(points, matrices, 64)
    place = torch.arange(64.0)
    mass = views.sum(dim=(1, 2))
    found = torch.stack([(views.sum(dim=1) @ place) / mass, (views.sum(dim=2) @ place) / mass], dim=1)
    assert (moved - points).abs().max() > 5 and (found - moved).abs().max() < 0.2


def test_located_view_is_the_training_view_and_keeps_unknown_points_unknown():
    source, points = patches(), torch.full((6, 2), 16.0)
    points[2] = torch.nan
    views, moved = located_view(source, points, generator(), 0.2, 0.2, 0.8)
    assert torch.equal(views, training_view(source, generator(), 0.2, 0.2, 0.8))
    assert moved.isnan().all(dim=1).tolist() == [row == 2 for row in range(6)]
