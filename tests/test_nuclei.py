"""Candidates: the same nuclei at every resolution, the number per mm2, padding, and real mitoses."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dasc.detect.candidates
from dasc.detect.candidates import AT_LEAST, find_candidates, measure_candidates
from dasc.errors import InputError
from dasc.images.read import read_field

SHARED = Path(__file__).resolve().parents[2] / "shared"
CYTOPLASM, NUCLEUS, CHROMATIN = (225, 170, 205), (150, 110, 175), (60, 40, 110)
FIELD_UM = 200.0


def centres_um(seed: int = 3, count: int = 60) -> np.ndarray:
    """Places on a jittered grid, at least 15 um apart and away from the edge; (count, 2) x, y."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(20, 190, 20.0), np.arange(20, 190, 20.0)), axis=-1).reshape(-1, 2)
    return (grid + rng.uniform(-2.5, 2.5, grid.shape))[rng.permutation(len(grid))[:count]]


def draw(um_per_px: float, dark: int = 5) -> np.ndarray:
    """Draw nuclei of 3.5 um radius on cytoplasm; the first `dark` are condensed, 2.5 um, as a mitosis is."""
    side = round(FIELD_UM / 0.05)
    image = np.full((side, side, 3), CYTOPLASM, np.uint8)
    for number, centre in enumerate(centres_um() / 0.05 - 0.5):
        radius, colour = (50, CHROMATIN) if number < dark else (70, NUCLEUS)
        cv2.circle(image, tuple(int(v) for v in np.round(centre)), radius, colour, -1, cv2.LINE_AA)
    size = round(FIELD_UM / um_per_px)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def distance_um(points_px: np.ndarray, um_per_px: float) -> np.ndarray:
    """Distance of every drawn nucleus to its nearest candidate; pixel 0 has its centre at 0."""
    found_um = (points_px + 0.5) * um_per_px
    return np.linalg.norm(centres_um()[:, None] - found_um[None], axis=2).min(axis=1)


@pytest.mark.parametrize("um_per_px", [0.1, 0.2274, 0.25, 0.3, 0.5, 0.7, 1.0])
def test_same_nuclei_at_every_resolution(um_per_px):
    points_px, score = find_candidates(draw(um_per_px), um_per_px)
    # A flat disk has a flat maximum: the place may be off by part of the nucleus' radius.
    assert distance_um(points_px, um_per_px).max() < 3.0
    assert points_px.dtype == score.dtype == np.float64 and points_px.shape == (len(score), 2)
    assert (np.diff(score) <= 0).all()
    assert distance_um(points_px[:5], um_per_px)[:5].max() < 3.0, "the condensed ones come first"


def test_places_have_no_offset():
    spread = 2.0
    for um_per_px in (0.1, 0.2274, 0.25, 0.5, 1.0):
        size = round(80 / um_per_px)
        y, x = np.mgrid[:size, :size] * um_per_px
        hill = np.exp(-((x - 31.2) ** 2 + (y - 47.9) ** 2) / (2 * spread**2))
        image = (np.array(CYTOPLASM) - hill[..., None] * (np.array(CYTOPLASM) - CHROMATIN)).astype(np.uint8)
        points_px, _ = find_candidates(image, um_per_px)
        assert points_px[0] * um_per_px == pytest.approx([31.2, 47.9], abs=max(0.5, um_per_px))


@pytest.mark.parametrize("per_mm2", [250.0, 600.0, 1800.0])
def test_number_per_mm2(per_mm2):
    image = draw(0.25)
    everything, all_scores = find_candidates(image, 0.25, per_mm2=None)
    points_px, score = find_candidates(image, 0.25, per_mm2=per_mm2)
    assert len(points_px) == min(len(everything), int(per_mm2 * FIELD_UM**2 / 1e6))
    np.testing.assert_array_equal(points_px, everything[: len(points_px)])
    np.testing.assert_array_equal(score, all_scores[: len(points_px)])


def test_a_tiny_field_keeps_a_few():
    crop = draw(0.25)[100:220, 100:220]
    assert 1 <= len(find_candidates(crop, 0.25, per_mm2=1.0)[0]) <= AT_LEAST


def test_same_field_same_candidates():
    image = draw(0.25)
    tiled = np.tile(image, (2, 2, 1))  # four times every score: ties
    first, second = find_candidates(tiled, 0.25), find_candidates(tiled.copy(), 0.25)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), CYTOPLASM, (3, 5, 2)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (9, 7), (300, 400)])
def test_one_colour_has_no_nucleus(colour, shape):
    points_px, score = find_candidates(np.full((*shape, 3), colour, np.uint8), 0.25)
    assert points_px.shape == (0, 2) and score.shape == (0,)


def test_glass_with_noise_has_no_nucleus():
    noise = np.random.default_rng(0).normal(243, 3, (600, 600, 3)).round().clip(0, 255).astype(np.uint8)
    assert len(find_candidates(noise, 0.25)[0]) == 0


def test_smaller_than_a_nucleus():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    for um_per_px in (0.1, 0.25, 1.0):
        points_px, score = find_candidates(image, um_per_px)
        assert len(points_px) <= AT_LEAST and np.isfinite(score).all()


def test_black_padding_holds_no_candidate_and_hides_none():
    image = draw(0.25)
    padded = cv2.copyMakeBorder(image, 300, 0, 500, 200, cv2.BORDER_CONSTANT)
    padded = cv2.imdecode(cv2.imencode(".jpg", padded)[1], cv2.IMREAD_COLOR)
    points_px, _ = find_candidates(padded, 0.25)
    inside = points_px - [500, 300]
    assert ((inside > 0) & (inside < image.shape[0])).all()
    assert distance_um(inside, 0.25).max() < 3.0
    assert distance_um(inside[:5], 0.25)[:5].max() < 3.0


def test_narrow_black_strip_holds_no_candidate():
    image = draw(0.25)
    image[:, :20] = 0  # 5 um
    points_px, _ = find_candidates(image, 0.25)
    assert points_px[:, 0].min() > 20


@pytest.mark.parametrize("cut_um", [0, 2])
def test_black_chromatin_is_no_padding(cut_um):
    image = draw(0.25)
    image[(image == CHROMATIN).all(axis=2)] = 0
    left_px = round((centres_um()[0, 0] - cut_um) / 0.25) if cut_um else 0  # the first one lies at the edge
    points_px, _ = find_candidates(np.ascontiguousarray(image[:, left_px:]), 0.25)
    assert distance_um(points_px[:8] + np.array([left_px, 0]), 0.25)[0] < 3.0


@pytest.mark.parametrize("gain", [0.6, 1.0, 1.15])
@pytest.mark.parametrize("gamma", [0.6, 1.0, 1.8])
def test_brightness_changes_no_rank(gain, gamma):
    image = (255 * (draw(0.25) / 255.0) ** gamma * gain).clip(0, 255).astype(np.uint8)
    points_px, _ = find_candidates(image, 0.25)
    assert distance_um(points_px, 0.25).max() < 3.0
    assert distance_um(points_px[:5], 0.25)[:5].max() < 3.0


@pytest.mark.parametrize("um_per_px", [0.0, 0.09, 1.01, float("nan"), -0.25])
def test_refuses_a_resolution_it_does_not_know(um_per_px):
    with pytest.raises(InputError, match=r"0\.1-1\.0"):
        find_candidates(draw(1.0), um_per_px)


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)],
    ids=["gray", "four channels", "float", "empty"],
)
def test_refuses_what_is_not_rgb(image):
    with pytest.raises(InputError, match="RGB"):
        find_candidates(image, 0.25)


@pytest.mark.skipif(not (SHARED / "data" / "mitos14").is_dir(), reason="the shared fields are not here")
def test_real_mitoses_are_kept():
    found = total = 0
    for slide in sorted((SHARED / "data" / "mitos14").iterdir()):
        for path in sorted((slide / "frames" / "x40").iterdir())[::7]:
            points_px, _ = find_candidates(read_field(path), 0.2274)
            with (slide / "mitosis" / f"{path.stem}_mitosis.csv").open() as file:
                for x, y, *_ in csv.reader(file):
                    total += 1
                    found += np.linalg.norm(points_px - [float(x), float(y)], axis=1).min() * 0.2274 <= 7.5
    assert total > 50
    assert found / total >= 0.985


def tissue(height: int, width: int, seed: int) -> np.ndarray:
    """Pink tissue with ragged nuclei of all shades, a gap, and noise as of a camera, at 0.25 um/px."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), CYTOPLASM, np.uint8)
    for x, y in rng.uniform(0, [width, height], (height * width // 3000, 2)):
        shade = rng.uniform(0, 1)
        colour = (shade * np.array(CHROMATIN) + (1 - shade) * np.array(NUCLEUS)).tolist()
        around = rng.uniform(6, 18) * rng.uniform(0.6, 1.2, 12)
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        outline = np.stack([x + around * np.cos(turns), y + around * np.sin(turns)], axis=1)
        cv2.fillPoly(image, [np.round(outline * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)
    cv2.ellipse(image, (width // 3, height // 3), (60, 30), 20, 0, 360, (244, 243, 245), -1)
    image = cv2.GaussianBlur(image, (0, 0), 1.0) + rng.normal(0, 3, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("um_per_px", [0.1, 0.2274, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(700, 900), (611, 437), (90, 31), (3, 2)])
def test_torch_finds_what_opencv_finds(shape, um_per_px):
    image = tissue(*shape, seed=1)
    image[: shape[0] // 3, : shape[1] // 5] = 0  # padding, where the field is large enough
    points_px, measures = measure_candidates(image, um_per_px)
    on_device, measures_on_device = measure_candidates(image, um_per_px, device=torch.device("cpu"))
    np.testing.assert_array_equal(on_device, points_px)
    np.testing.assert_allclose(measures_on_device, measures, atol=2e-6)


@pytest.mark.parametrize("image", [draw(0.25), np.tile(draw(0.25), (2, 2, 1))], ids=["plateaus", "ties"])
def test_torch_ranks_what_opencv_ranks(image):
    """Flat nuclei: rounding may move a maximum on its plateau, but the same nuclei are kept in the same order."""
    points_px, score = find_candidates(image, 0.25, 600)
    on_device, score_on_device = find_candidates(image, 0.25, 600, torch.device("cpu"))
    np.testing.assert_allclose(score_on_device, score, atol=1e-3)
    nearest = np.linalg.norm(points_px[:, None] - on_device[None], axis=2).min(axis=1) * 0.25
    assert (nearest < 3.0).mean() > 0.97


def test_torch_finds_nothing_on_glass():
    assert len(find_candidates(np.full((300, 400, 3), 240, np.uint8), 0.25, device=torch.device("cpu"))[0]) == 0


def test_where_the_device_has_no_memory_the_cpu_searches(monkeypatch, caplog):
    image = draw(0.25)
    points_px, _ = find_candidates(image, 0.25)
    whole = dasc.detect.candidates.smooth

    def full(image, sigma):
        if isinstance(image, torch.Tensor):
            raise torch.OutOfMemoryError("full")
        return whole(image, sigma)

    monkeypatch.setattr(dasc.detect.candidates, "smooth", full)
    np.testing.assert_array_equal(find_candidates(image, 0.25, device=torch.device("cpu"))[0], points_px)
    assert "memory is full" in caplog.text
