"""Patches show what lies at their centre, at the resolution asked for, whatever the field's."""

import cv2
import numpy as np
import pytest

from dasc.data.patches import load_patches, write_patch
from dasc.detect.cutter import ONE, PatchCutter, resample, taps_of
from dasc.errors import InputError


def field_with_dot(x: int, y: int, shape=(200, 300), radius: int = 3) -> np.ndarray:
    image = np.full((*shape, 3), 230, np.uint8)
    cv2.circle(image, (x, y), radius, (60, 40, 120), -1)
    return image


def dark_centre(patch: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) of what is dark in a patch (3, S, S)."""
    dark = 230 - patch.mean(axis=0)
    dark[dark < 20] = 0
    rows, columns = np.indices(dark.shape)
    return np.array([(columns * dark).sum(), (rows * dark).sum()]) / dark.sum()


@pytest.mark.parametrize("um_per_px", [0.12, 0.2274, 0.25, 0.5])
def test_point_lies_where_place_says(um_per_px):
    image = field_with_dot(150, 90, radius=max(3, round(1.5 / um_per_px)))
    cutter = PatchCutter(image, um_per_px, 0.25, 80)
    centre = np.array([146.0, 95.0])
    patch = cutter.cut(centre[None])[0]
    assert patch.shape == (3, 80, 80) and patch.dtype == np.uint8
    assert np.abs(dark_centre(patch) - cutter.place(np.array([150.0, 90.0]), centre)).max() < 0.6


@pytest.mark.parametrize("angle", [0.0, 60.0, -135.0, 180.0])
def test_turned_patch_keeps_its_point(angle):
    image = field_with_dot(150, 90, radius=5)
    cutter = PatchCutter(image, 0.2274, 0.25, 80)
    centre = np.array([140.0, 100.0])
    patch = cutter.cut_turned(centre, angle)
    assert np.abs(dark_centre(patch) - cutter.place(np.array([150.0, 90.0]), centre, angle)).max() < 0.8


def test_patch_at_the_corner_is_mirrored_not_black():
    rng = np.random.default_rng(0)
    image = rng.integers(100, 255, (120, 120, 3), dtype=np.uint8)
    for point in ([0.0, 0.0], [119.0, 119.0]):
        patch = PatchCutter(image, 0.25, 0.25, 80).cut(np.array([point]))[0]
        assert patch.min() >= 100


def test_field_smaller_than_a_patch():
    patches = PatchCutter(np.full((5, 7, 3), 90, np.uint8), 0.25, 0.25, 80).cut(np.array([[3.0, 2.0]]))
    assert patches.shape == (1, 3, 80, 80) and (patches == 90).all()


def test_no_point_no_patch():
    cutter = PatchCutter(field_with_dot(10, 10), 0.25, 0.25, 80)
    assert cutter.cut(np.empty((0, 2))).shape == (0, 3, 80, 80)


STAIN = np.array([[0.3, 0.6, 0.25], [0.2, 0.4, 0.1]], np.float32)  # as estimate_stain gives it


def noise(height: int = 150, width: int = 210) -> np.ndarray:
    field = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(field, (0, 0), 1.5)


@pytest.mark.parametrize("um_per_px", [0.11, 0.2274, 0.25, 0.2456 * 0.25 / 0.167, 0.5, 0.6])
@pytest.mark.parametrize("stain", [None, STAIN])
def test_what_is_cut_is_the_resampled_field(um_per_px, stain):
    """To a grey level, corners included, where patches show the mirrored field."""
    field = noise()
    cutter = PatchCutter(field, um_per_px, 0.25, 40, stain=stain)
    points = np.array([[0.0, 0.0], [209.0, 149.0], [100.3, 70.8], [-3.0, 149.5], [57.0, 1.0]])
    corners = np.round((points + 0.5) * cutter.scale - 0.5).astype(int) + cutter.margin - 20
    for patch, (x, y) in zip(cutter.cut(points), corners, strict=True):
        whole = cutter.padded[y : y + 40, x : x + 40].transpose(2, 0, 1)
        differ = np.abs(patch.astype(int) - whole)
        assert differ.max() <= 1 if um_per_px != 0.25 else (differ == 0).all()


@pytest.mark.parametrize("um_per_px", [0.2, 0.4])
def test_a_part_of_a_field_gives_the_pixels_of_the_whole(um_per_px):
    """Half of the rows and columns of a field resampled 4 to 5 or 8 to 5: patches are the same to the byte."""
    field = noise(200, 240)
    points = np.array([[150.0, 120.0], [160.4, 131.7], [171.2, 140.9]])
    corner = np.array([120, 100])  # a whole number of resampled pixels
    whole, part = (
        PatchCutter(shown, um_per_px, 0.25, 24, stain=STAIN)
        for shown in (field, np.ascontiguousarray(field[100:, 120:]))
    )
    assert (whole.cut(points) == part.cut(points - corner)).all()


@pytest.mark.parametrize("scale", [0.1, 0.4548, 0.91, 1.0, 1.3618, 2.0, 7.3])
def test_weights_of_a_pixel_add_up(scale):
    taps, weights = taps_of(np.array([-7, 0, 1, 511]), 30, scale)
    assert (weights.sum(axis=2) == ONE).all() and (weights >= 0).all() and (weights == weights.round()).all()
    centre = (taps * weights).sum(axis=2) / ONE  # of what a pixel is made of
    expected = (np.array([-7, 0, 1, 511])[:, None] + np.arange(30) + 0.5) / scale - 0.5
    assert np.abs(centre - expected).max() <= 0.05 * max(1, 1 / scale)


def test_resample_keeps_the_width_of_tissue():
    image = np.zeros((1000, 600, 3), np.uint8)
    assert resample(image, 0.5, 0.25).shape == (2000, 1200, 3)
    assert resample(image, 0.25, 0.25) is image


def test_written_patches_come_back(tmp_path):
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 255, (5, 3, 16, 16), dtype=np.uint8)
    paths = [tmp_path / f"Größe {number}.png" for number in range(5)]
    for path, patch in zip(paths, patches, strict=True):
        write_patch(path, patch)
    assert (load_patches(paths, 2).numpy() == patches).all()


@pytest.mark.parametrize("fault", ["gone", "broken", "size"])
def test_bad_patch_is_named(tmp_path, fault):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        write_patch(path, np.zeros((3, 16, 16), np.uint8))
    if fault == "gone":
        paths[1].unlink()
    elif fault == "broken":
        paths[1].write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    else:
        write_patch(paths[1], np.zeros((3, 20, 20), np.uint8))
    with pytest.raises(InputError, match=r"1\.png"):
        load_patches(paths, 2)
