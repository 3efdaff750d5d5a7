"""Normalisation: two stains of one field come out alike, and fields without tissue stay as they are."""

import numpy as np
import pytest

from dasc.images.stain import DENSITY, MEAN, SPREAD, normalise_stain


def field(factors, offset=0.0) -> np.ndarray:
    """A random field whose optical densities are multiplied and moved."""
    rng = np.random.default_rng(0)
    density = rng.gamma(4.0, [0.06, 0.15, 0.08], size=(240, 320, 3)) * factors + offset
    return np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def test_mean_and_spread_of_the_tissue_are_the_common_ones():
    density = DENSITY[normalise_stain(np.repeat(np.repeat(field(1.0), 8, 0), 8, 1))].reshape(-1, 3)
    assert np.abs(density.mean(axis=0) - MEAN).max() < 0.05
    assert np.abs(density.std(axis=0) - SPREAD).max() < 0.05


@pytest.mark.parametrize("factors", [0.6, (1.4, 0.8, 1.2)])
def test_another_stain_comes_out_alike(factors):
    first, second = (np.repeat(np.repeat(field(factor), 8, 0), 8, 1) for factor in (1.0, factors))
    apart = [np.abs(a.astype(int) - b).mean() for a, b in ((first, second), map(normalise_stain, (first, second)))]
    assert apart[1] < apart[0] / 4


def test_fields_without_tissue_stay():
    for image in (np.full((400, 400, 3), 245, np.uint8), np.full((400, 400, 3), 90, np.uint8), field(1.0)[:3, :3]):
        assert normalise_stain(image) is image
