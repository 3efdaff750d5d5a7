"""Weak and strong views: pictures of the same patch, each drawn for itself, as strong as they say."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dasc.model.augment import dihedral, to_float
from dasc.model.views import blur, elastic, jitter_colour, strong_view, turn, weak_view


def patches(number: int = 6, side: int = 32) -> torch.Tensor:
    return torch.randint(40, 220, (number, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def smooth(number: int = 6, side: int = 32) -> torch.Tensor:
    """A dark disc on a soft slope, float, another for every patch."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = (x - side / 2) ** 2 + (y - side / 2 - torch.arange(number)[:, None, None] % 3) ** 2
    return (0.8 - 0.6 * torch.exp(-disc / 40) - 0.002 * x)[:, None].expand(-1, 3, -1, -1).contiguous()


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("view", [weak_view, strong_view])
def test_views_keep_shape_range_and_seed(view):
    source = patches()
    before = source.clone()
    views = view(source, generator())
    assert views.shape == source.shape and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1 and views.isfinite().all()
    assert torch.equal(views, view(source, generator())) and torch.equal(source, before)
    assert not torch.allclose(views, view(source, generator(4)), atol=0.05)


@pytest.mark.parametrize("view", [weak_view, strong_view])
def test_every_patch_gets_its_own_view(view):
    same = patches(1).expand(8, -1, -1, -1)
    assert len({tuple(patch.flatten()[:50].tolist()) for patch in view(same, generator())}) == 8


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("view", [weak_view, strong_view])
def test_the_smallest_batches_work(view, number):
    """With a patch or two it happens that none is coloured or none is stained."""
    for seed in range(6):
        assert view(patches(number), generator(seed)).shape == (number, 3, 32, 32)


def test_strength_zero_only_turns():
    source = patches()
    for view in (weak_view, strong_view):
        views = view(source, generator(), 0.0)
        for patch, changed in zip(to_float(source), views, strict=True):
            turned = [dihedral(patch[None], number)[0] for number in range(8)]
            assert min((changed - one).abs().max() for one in turned) < 1e-4


def test_strong_is_stronger():
    """From its nearest right-angle turn a strong view lies farther away than a weak one."""
    source = (smooth(48) * 255).to(torch.uint8)

    def change(views):
        turned = torch.stack([dihedral(to_float(source), number) for number in range(8)])
        return (views - turned).abs().mean(dim=(2, 3, 4)).amin(dim=0).mean().item()

    assert change(strong_view(source, generator())) > 1.5 * change(weak_view(source, generator())) > 0


@pytest.mark.parametrize(("quarter", "kinds"), [(False, 4), (True, 8)])
def test_turn_reaches_every_view(quarter, kinds):
    views = turn(patches(1).expand(200, -1, -1, -1), generator(), quarter)
    known = {tuple(dihedral(patches(1), number).flatten().tolist()) for number in range(8)}
    found = {tuple(view.flatten().tolist()) for view in views}
    assert found <= known and len(found) == kinds


def test_elastic_moves_pixels_by_no_more_than_it_may():
    """A picture of the pixels' own x and y shows how far each came from."""
    side, amplitude_px = 48, 2.0
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    place = torch.stack([x, y])[None].expand(16, -1, -1, -1)
    moved = (elastic(place, generator(), amplitude_px, 16) - place)[:, :, 4:-4, 4:-4]
    assert 1.0 < moved.abs().max() < 1.5 * amplitude_px  # bicubic may swing a little beyond its control points
    assert abs(moved.mean()) < 0.3
    assert moved.diff(dim=3).abs().max() < 0.5 and moved.diff(dim=2).abs().max() < 0.5  # no tears, no folds
    assert (elastic(place, generator(), 0.0, 16) - place).abs().max() < 1e-4


def test_blur_is_the_gaussian():
    """Each sigma is drawn as the generator says, and the inside equals scipy's filter."""
    source = to_float(patches(5))
    sigmas = 1.5 * torch.rand(5, generator=generator())
    blurred = blur(source, generator(), 1.5)
    for patch, result, sigma in zip(source.numpy(), blurred.numpy(), sigmas.tolist(), strict=True):
        expected = np.stack([gaussian_filter(channel, sigma, truncate=8) for channel in patch])
        assert np.allclose(result[:, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-4)
    flat = torch.full((4, 3, 32, 32), 0.6)
    assert torch.allclose(blur(flat, generator(), 2.0), flat, atol=1e-5)  # nor does the edge darken


def test_colour_keeps_grey_and_luma():
    grey = torch.rand(6, 1, 8, 8, generator=generator()).expand(-1, 3, -1, -1)
    assert torch.allclose(jitter_colour(grey, generator(), 1.0, 0.3), grey, atol=1e-5)
    source = 0.45 + 0.1 * to_float(patches())  # far enough from 0 and 1 that nothing is clipped
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    changed = jitter_colour(source, generator(), 1.0, 0.3)
    assert torch.allclose((changed * luma).sum(dim=1), (source * luma).sum(dim=1), atol=1e-5)
    assert not torch.allclose(changed, source, atol=0.02)


def test_hue_goes_round_by_what_it_says():
    """By colorsys' own YIQ the chroma turns by up to the given share of the circle, both ways, and stays as large."""
    source = (0.6, 0.45, 0.5)
    pictures = torch.tensor(source).view(1, 3, 1, 1).expand(300, -1, 4, 4)
    changed = jitter_colour(pictures, generator(), 0.0, 0.25)[:, :, 0, 0].tolist()
    before, after = (
        np.array([complex(*colorsys.rgb_to_yiq(*colour)[1:]) for colour in colours]) for colours in ([source], changed)
    )
    turned = np.angle(after / before) / (2 * np.pi)
    assert 0.24 < turned.max() < 0.26 and -0.26 < turned.min() < -0.24
    assert np.allclose(abs(after), abs(before), rtol=0.05)


def test_saturation_reaches_grey_and_double():
    source = torch.tensor([0.6, 0.45, 0.5]).view(1, 3, 1, 1).expand(300, -1, 4, 4)
    changed = jitter_colour(source, generator(), 1.0, 0.0)[:, :, 0, 0]
    spread = (changed.amax(dim=1) - changed.amin(dim=1)) / 0.15
    assert spread.min() < 0.1 and 1.9 < spread.max() <= 2.001
