"""Tissue is found by its colours; glass, dust and ink are not tissue."""

import cv2
import numpy as np
import pytest

from dasc.images.tissue import field_mm2, find_tissue

GLASS, EOSIN, HEMATOXYLIN = (240, 239, 241), (228, 170, 205), (120, 80, 160)
INKS = {"blue": (40, 70, 190), "green": (20, 120, 60), "black": (25, 25, 30), "red": (215, 30, 45)}


def overview(ink=None, glass=GLASS):
    """Glass with a piece of tissue, at 8 um/px, and a stroke of ink beside and over it."""
    image = np.full((300, 400, 3), glass, np.uint8)
    cv2.circle(image, (150, 150), 90, EOSIN, -1)
    rng = np.random.default_rng(0)
    for x, y in rng.uniform(80, 220, (400, 2)):
        cv2.circle(image, (int(x), int(y)), 1, HEMATOXYLIN, -1)
    if ink:
        cv2.line(image, (290, 20), (290, 280), ink, 16)
        cv2.line(image, (40, 60), (290, 60), ink, 12)
    noise = rng.normal(0, 3, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.8) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (215, 215, 213)])
def test_all_tissue_and_no_glass(glass):
    mask = find_tissue(overview(glass=glass), 8.0)
    truth = np.hypot(*(np.indices(mask.shape) - 150)) <= 90
    assert mask[truth].all() and mask[cv2.dilate(truth.astype(np.uint8), np.ones((21, 21))) == 0].sum() == 0


@pytest.mark.parametrize("ink", INKS)
def test_ink_is_left_out_and_the_tissue_beside_it_stays(ink):
    mask = find_tissue(overview(INKS[ink]), 8.0)
    assert not mask[:, 284:297].any() and not mask[55:66, 45:285].any()
    truth = np.hypot(*(np.indices(mask.shape) - 150)) <= 90
    truth[:80] = False
    assert mask[truth].all() and not mask[:, 310:].any()


def test_specks_are_left_out_and_gaps_are_filled():
    image = overview()
    cv2.circle(image, (350, 250), 4, EOSIN, -1)
    cv2.circle(image, (150, 150), 4, GLASS, -1)
    mask = find_tissue(image, 8.0)
    assert not mask[230:, 330:].any() and mask[150, 150]


@pytest.mark.parametrize("colour", [GLASS, (0, 0, 0), *INKS.values()])
def test_nothing_but_one_colour(colour):
    assert not find_tissue(np.full((50, 60, 3), colour, np.uint8), 8.0).any()


def test_bluish_and_faint_stains_are_tissue():
    for colour in ((150, 130, 190), (235, 222, 232), (200, 120, 130), (90, 60, 120)):
        assert find_tissue(np.full((80, 80, 3), colour, np.uint8), 8.0).all(), colour


@pytest.mark.parametrize("colour", [(200, 120, 180), (150, 150, 150), (0, 0, 0)])  # pink, gray, black
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_area_of_a_field_leaves_glass_out(colour, share):
    field = np.full((1600, 2000, 3), GLASS, np.uint8)
    field[:, : int(2000 * share)] = colour
    whole_mm2 = 1600 * 2000 * 0.25**2 / 1e6
    assert field_mm2(field, 0.25) == pytest.approx(share * whole_mm2, abs=0.1 * whole_mm2)


def test_area_of_a_field_of_any_size():
    assert field_mm2(np.full((3, 5, 3), (200, 120, 180), np.uint8), 0.25) == pytest.approx(15 * 0.25**2 / 1e6)
