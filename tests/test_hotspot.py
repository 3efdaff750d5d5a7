"""The hotspot holds the most mitoses of all windows, wherever they lie; a count has its interval, and a density."""

import numpy as np
import pytest

from dasc.judge.density import SMALLEST_MM2, per_mm2, poisson_interval
from dasc.judge.hotspot import find_hotspot


def count(points, x, y, wide, high):
    inside = (points >= [x - 1e-6, y - 1e-6]) & (points <= [x + wide + 1e-6, y + high + 1e-6])
    return int(inside.all(axis=1).sum())


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    width, height = rng.integers(3000, 9000, 2)
    points = rng.uniform(0, 1, (60, 2)) * [width - 1, height - 1]
    points[:20] = rng.normal([width * 0.7, height * 0.3], 700, (20, 2)).clip(0, [width - 1, height - 1])
    if seed % 3 == 0:
        points = points.round(-3)  # many share an edge
    spot = find_hotspot(points, int(width), int(height), 0.5)
    best = max(count(points, x, y, spot.width_px, spot.height_px) for x in points[:, 0] for y in points[:, 1])
    assert spot.mitoses == best == count(points + 0.5, spot.x_px, spot.y_px, spot.width_px, spot.height_px)
    assert spot.area_mm2(0.5) == pytest.approx(2.0)
    assert spot.x_px >= 0 and spot.x_px + spot.width_px <= width + 1e-6
    assert spot.y_px >= 0 and spot.y_px + spot.height_px <= height + 1e-6
    assert not spot.whole


def test_the_window_is_not_on_a_grid():
    points = np.array([[5100.0, 5100], [7800, 7800], [5100, 7800], [1000, 1000]])
    spot = find_hotspot(points, 20_000, 20_000, 0.5)
    assert spot.mitoses == 3 and spot.width_px == pytest.approx(2828.427)
    assert spot.x_px + spot.width_px / 2 == pytest.approx(6450.5)


def test_a_narrow_image_has_a_longer_window():
    spot = find_hotspot(np.array([[100.0, 900], [7000, 10]]), 20_000, 1000, 0.5)
    assert (spot.width_px, spot.height_px, spot.mitoses) == (8000, 1000, 2)
    tall = find_hotspot(np.array([[900.0, 100]]), 1000, 20_000, 0.5)
    assert (tall.width_px, tall.height_px) == (1000, 8000)


def test_an_image_smaller_than_the_window_is_the_window():
    spot = find_hotspot(np.array([[5.0, 5], [900, 800]]), 1000, 900, 0.25)
    assert spot.whole and spot.mitoses == 2 and (spot.width_px, spot.height_px) == (1000, 900)
    assert spot.area_mm2(0.25) == pytest.approx(0.05625)


def test_no_mitosis_at_all():
    spot = find_hotspot(np.empty((0, 2)), 20_000, 10_000, 0.25)
    assert spot.mitoses == 0 and spot.x_px + spot.width_px / 2 == pytest.approx(10_000)
    assert find_hotspot(np.empty((0, 2)), 100, 100, 0.25).whole


def test_many_mitoses_are_quick():
    points = np.random.default_rng(0).uniform(0, 60_000, (5000, 2))
    assert find_hotspot(points, 60_000, 60_000, 0.25).mitoses > 30


@pytest.mark.parametrize(
    ("count", "low", "high"),  # exact intervals as tables give them
    [(0, 0.0, 3.689), (1, 0.0253, 5.572), (5, 1.623, 11.668), (10, 4.795, 18.390), (100, 81.364, 121.627)],
)
def test_the_interval_of_a_count_is_the_exact_one(count, low, high):
    assert poisson_interval(count) == pytest.approx((low, high), abs=1e-3)


def test_the_interval_holds_the_truth_at_least_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for truth in (0.7, 4.0, 23.0):
        counts, often = np.unique(rng.poisson(truth, 20_000), return_counts=True)
        held = [low <= truth <= high for low, high in map(poisson_interval, counts.tolist())]
        assert often[held].sum() / often.sum() > 0.945


def test_a_density_needs_an_area():
    assert per_mm2(3, SMALLEST_MM2) == pytest.approx(3 / SMALLEST_MM2) and per_mm2(0, 2.0) == 0
    assert np.isnan(per_mm2(3, SMALLEST_MM2 - 1e-6)) and np.isnan(per_mm2(0, 0.0))
