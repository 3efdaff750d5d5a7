"""Look where the labels of a dataset fall: annotated mitoses lie at nuclei, unless x and y or the unit are wrong.

Nearly every mitosis lies at one of a field's best candidates, whoever annotated it; a point anywhere seldom does.
tests/benchmarks/labels.py measures both shares.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from dasc.detect.candidates import AT_LEAST, find_candidates
from dasc.errors import InputError
from dasc.images.read import read_field
from dasc.images.resolution import choose_resolution, read_stated

PER_MM2 = 900.0  # best candidates per mm2 that a mitosis is looked for among: a point anywhere is near one in 15 %
PER_MITOSIS = 4  # candidates at least, where a field is crowded with mitoses as the synthetic sample is
NEAR_UM = 7.5  # from a candidate, as a detection is right within it
# Right labels have 0.93 to 1.00 at a candidate (0.83 of 12 in the worst slide), wrong ones 0.02 to 0.26, boxes' corners
# taken for their centres 0.26 to 0.37 (docs/log.md, "Where labels fall").
LOWEST_SHARE = 0.6
FEWEST = 10  # mitoses to judge by: of ten wrong ones, six at a candidate are a matter of 1 in 150
MOST_FIELDS = 24  # fields looked at, drawn evenly from those with a mitosis
MOST_PX = 100_000_000  # an image of more is passed over: it would be read whole for this
LIKELY_SHARE = 0.75  # a cause is named when the labels set right by it have this share; hundreds are tried
SCALES = np.geomspace(0.05, 20, 1200)  # of another image's size to this one's; steps of 0.5 %
FARTHEST_SHIFT_UM = 60.0

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """A field's annotated mitoses, (N, 2), its candidates, (M, 2), best first, and its size, in px."""

    mitoses: np.ndarray
    candidates: np.ndarray
    width: int
    height: int
    um_per_px: float


def check_size(field, width: int, height: int) -> None:
    """Raise InputError where the labels state another size of the image than the file has.

    field: a row of `Dataset.fields`. width, height: of the file, in px.
    """
    stated = getattr(field, "width_px", np.nan), getattr(field, "height_px", np.nan)
    if all(side > 0 for side in stated) and stated != (width, height):
        raise InputError(
            f"{field.path}: the file has {width} x {height} px, its labels are for {stated[0]:g} x {stated[1]:g} px; "
            "use the image that was annotated, or --check_labels False where the labels fit this one nevertheless"
        )


def check_labels(
    fields: pd.DataFrame,
    mitoses: pd.DataFrame,
    root: Path,
    insist: bool = False,
    per_mm2: float = PER_MM2,
    each: Callable = map,
) -> tuple[float, dict[str, np.ndarray]]:
    """Look where the mitoses of up to MOST_FIELDS fields fall, and raise InputError where it is not at nuclei.

    Too few mitoses to judge by are said. A field that cannot be read is passed over: whoever needs it names it.

    fields, mitoses: as `Dataset.fields`, with asked_um_per_px, and `Dataset.annotations`. root: of the dataset. insist:
    as `choose_resolution`. per_mm2: candidates that the caller wants. each: map, or a parallel one.
    Returns: the share of the mitoses that lie at a candidate, NaN for too few mitoses; points_px (N, 2) of the
    `per_mm2` best candidates of every image looked at, best first.
    """

    def look(field) -> tuple[str, Labels] | None:
        try:
            return field.image, find_labels(field, mitoses, root, insist)
        except InputError:
            return None

    with_mitoses = fields[fields["image"].isin(mitoses["image"])]
    drawn = np.unique(np.linspace(0, len(with_mitoses) - 1, min(MOST_FIELDS, len(with_mitoses))).round().astype(int))
    looked = dict(filter(None, each(look, with_mitoses.iloc[drawn].itertuples())))
    share = judge_labels(list(looked.values()), root)
    return share, {image: best_of(one, per_mm2) for image, one in looked.items()}


def find_labels(field, mitoses: pd.DataFrame, root: Path, insist: bool) -> Labels:
    """The mitoses and all candidates of a field. Raises: InputError where it cannot be read or is too large."""
    image = read_field(root / field.path)
    height, width = image.shape[:2]
    if height * width > MOST_PX:
        raise InputError(f"{field.path}: {width} x {height} px, more than {MOST_PX:,}")
    path = root / field.path
    um_per_px = choose_resolution(path, read_stated(path), field.um_per_px, field.asked_um_per_px, insist).um_per_px
    points = mitoses.loc[mitoses["image"] == field.image, ["x_px", "y_px"]].to_numpy(float)
    return Labels(points, find_candidates(image, um_per_px, None)[0], width, height, um_per_px)


def best_of(one: Labels, per_mm2: float, at_least: int = AT_LEAST) -> np.ndarray:
    """The `per_mm2` best candidates of a field, as `find_candidates` counts them, or more."""
    area_mm2 = one.width * one.height * one.um_per_px**2 / 1e6
    return one.candidates[: max(AT_LEAST, at_least, int(per_mm2 * area_mm2))]


def judge_labels(looked: list[Labels], root: Path) -> float:
    """The share of the mitoses that lie at a candidate, NaN for too few mitoses.

    Raises: InputError: it is below LOWEST_SHARE; names what is probably wrong with the labels.
    """
    looked = [one._replace(candidates=best_of(one, PER_MM2, PER_MITOSIS * len(one.mitoses))) for one in looked]
    count = sum(len(one.mitoses) for one in looked)
    if count < FEWEST:
        logger.warning("%s: where the labels fall was not checked: %d mitoses, of %d needed", root, count, FEWEST)
        return np.nan
    share = share_near(looked, [one.mitoses for one in looked])
    if share < LOWEST_SHARE:
        raise InputError(
            f"{root}: {share:.0%} of {count} annotated mitoses in {len(looked)} fields lie within {NEAR_UM:g} um of "
            f"one of the {PER_MM2:g} likeliest nuclei per mm2, expected {LOWEST_SHARE:.0%} or more: "
            f"{likely_cause(looked)}; --check_labels False goes on nevertheless"
        )
    return share


def share_near(looked: list[Labels], places: list[np.ndarray]) -> float:
    """The share of points, (N, 2) of every field, in px, that lie within NEAR_UM of a candidate."""
    near = [
        cKDTree(one.candidates).query(points)[0] * one.um_per_px <= NEAR_UM  # infinity without a candidate
        for one, points in zip(looked, places, strict=True)
    ]
    return float(np.mean(np.concatenate(near)))


def _swapped(one: Labels, points: np.ndarray) -> np.ndarray:
    return points[:, ::-1]


def _from_um(one: Labels, points: np.ndarray) -> np.ndarray:
    return points / one.um_per_px


def _from_shares(one: Labels, points: np.ndarray) -> np.ndarray:
    return points * [one.width, one.height]


def _mirrored_x(one: Labels, points: np.ndarray) -> np.ndarray:
    return np.stack([one.width - 1 - points[:, 0], points[:, 1]], axis=1)


def _mirrored_y(one: Labels, points: np.ndarray) -> np.ndarray:
    return np.stack([points[:, 0], one.height - 1 - points[:, 1]], axis=1)


# What may be wrong, what sets it right step by step, and what to do.
CAUSES = (
    ("x and y are swapped", (_swapped,), "exchange the two columns"),
    ("they are in um, not in px", (_from_um,), "divide them by um/px"),
    ("they are shares of the image, not px", (_from_shares,), "multiply them by its width and height"),
    ("they are mirrored left to right", (_mirrored_x,), "take x from the other edge"),
    ("they are upside down", (_mirrored_y,), "take y from the other edge"),
    ("they are turned by 180 degrees", (_mirrored_x, _mirrored_y), "turn them back"),
    ("they are turned by 90 degrees", (_swapped, _mirrored_x), "turn them back"),
    ("they are turned by 90 degrees", (_swapped, _mirrored_y), "turn them back"),
    ("x and y are swapped, and in um", (_swapped, _from_um), "exchange the two columns, divide them by um/px"),
    ("x and y are swapped, and shares of the image", (_swapped, _from_shares), "exchange and multiply them"),
)


def likely_cause(looked: list[Labels]) -> str:
    """What is probably wrong with labels that miss the candidates, with the share that would lie at them set right."""
    tried = []
    for words, steps, remedy in CAUSES:
        places = [one.mitoses for one in looked]
        for step in steps:
            places = [step(one, points) for one, points in zip(looked, places, strict=True)]
        tried.append((share_near(looked, places), words, remedy))
    best = max(tried, key=lambda one: one[0])
    shift, share = _best_shift(looked)
    if share > best[0] + 0.01:
        words = "they lie beside their nuclei, as corners of boxes do where centres are expected"
        best = share, words, f"add {shift[0]:.0f} px to x and {shift[1]:.0f} px to y"
    for swapped in (False, True):
        scale, share = _best_scale(looked, swapped)
        if share > max(best[0], LIKELY_SHARE) + 0.01:
            words = "they are for an image of another size" + ", with x and y swapped" * swapped
            best = share, words, f"multiply them by {scale:.2f}"
    if best[0] < LIKELY_SHARE:
        return (
            "neither swapped, in um, shares, mirrored, turned, moved nor for another size; do they belong to these "
            "images, and is --um_per_px right?"
        )
    return f"probably {best[1]} ({best[0]:.0%} if so); {best[2]}"


def _best_scale(looked: list[Labels], swapped: bool) -> tuple[float, float]:
    places = [_swapped(one, one.mitoses) if swapped else one.mitoses for one in looked]
    shares = [share_near(looked, [points * scale for points in places]) for scale in SCALES]
    best = max(shares)
    return float(np.median(SCALES[np.equal(shares, best)])), best


def _best_shift(looked: list[Labels]) -> tuple[np.ndarray, float]:
    """The shift (2,) in px after which most mitoses lie at a candidate, and their share."""
    offsets = np.concatenate(
        [((one.candidates[None] - one.mitoses[:, None]) * one.um_per_px).reshape(-1, 2) for one in looked]
    )
    offsets = offsets[np.hypot(*offsets.T) <= FARTHEST_SHIFT_UM]
    if not len(offsets):
        return np.zeros(2), 0.0
    tree = cKDTree(offsets)
    neighbours = tree.query_ball_point(offsets, 2.0, return_length=True)
    shift = offsets[tree.query_ball_point(offsets[int(np.argmax(neighbours))], 2.0)].mean(axis=0)
    share = share_near(looked, [one.mitoses + shift / one.um_per_px for one in looked])
    return shift / np.median([one.um_per_px for one in looked]), share
