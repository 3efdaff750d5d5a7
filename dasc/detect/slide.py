"""Scan a whole slide tile by tile in bounded memory.

Of a field, the candidates are ranked, the stain is estimated and the second look is chosen among the field's own
nuclei. A slide is surveyed first: squares spread evenly over its tissue give its stain, the spread of its candidates'
measures, its score alignment, and the two cuts (a score, a first probability) that keep as many candidates per mm2 as
in a field. After that every candidate is judged by itself, so that neither the tiles nor their order change the
detections.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from tqdm import tqdm

from dasc.detect.candidates import score_candidates, spread_of
from dasc.detect.field import AT_LEAST, merge, most_seen_again, off_the_edge, over_all_views, search_device
from dasc.detect.tiles import Grid, Tile, make_grid
from dasc.images.slides import Slide
from dasc.images.stain import estimate_stain, tissue_density
from dasc.images.tissue import Tissue
from dasc.model.checkpoint import Detector
from dasc.model.inference import device_of, log_odds
from dasc.model.network import CamNetwork

TILE_UM = 1000.0  # side of a tile, about: larger ones read less margin and take more memory
SURVEY_UM = 256.0  # side of a surveyed square, about
SURVEYED = 24  # squares surveyed, about 2 mm2 in all
READ_AHEAD = 2  # tiles that wait for the network, beside those that the threads are at
SAVE_EVERY = 50  # tiles after which the progress is saved


@dataclass
class Progress:
    """How far a slide is scanned, in plain values that can be kept on disk.

    survey: as `survey_slide`. tiles: how many are done. found: x, y in the slide's pixels and probability, not merged.
    """

    survey: dict[str, Any] | None = None
    tiles: int = 0
    found: list[list[float]] = field(default_factory=list)


def scan_slide(
    detector: Detector,
    slide: Slide,
    um_per_px: float,
    tissue: Tissue,
    *,
    batch_size: int,
    smallest: float,
    workers: int,
    progress: Progress | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    tile_um: float = TILE_UM,
    shift: tuple[int, int] = (0, 0),
) -> pd.DataFrame:
    """Detections on the tissue of a slide, strongest first: x_px, y_px in its full resolution, probability.

    batch_size, smallest: as `field.scan_field`. workers: threads that read tiles and find candidates.
    progress: where an earlier scan with the same settings was left. save: called with it every SAVE_EVERY tiles.
    tile_um, shift: side of a tile, and blocks down and across by which the tiles are moved; they change nothing that is
    found.
    Raises: InputError: a region that cannot be read.
    """
    progress = progress or Progress()
    has_look = detector.first_look is not None
    grid = make_grid(slide, um_per_px, detector.patch_um_per_px, detector.patch_size, has_look)
    if progress.survey is None:
        progress.survey = survey_slide(detector, slide, grid, tissue, batch_size=batch_size, workers=workers)
    survey = progress.survey
    odds_shift = survey.get("shift_of_odds", 0.0)  # none where there is no tissue
    if survey:
        device = device_of(detector.network)
        stain = survey["stain"] and np.array(survey["stain"], np.float32)

        def look(place: tuple) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
            tile = Tile(slide, grid, *place)
            points_px, scores = _candidates(detector, tissue, tile, stain, tuple(survey["padding_density"]))
            if not has_look:
                scores = score_candidates(scores, np.array(survey["middle"]), np.array(survey["spread"]))
            in_slide = grid.in_slide(points_px)
            seen = off_the_edge(in_slide, slide.width, slide.height, um_per_px) & (scores >= survey["lowest_score"])
            added = scores[seen] if has_look else np.zeros(int(seen.sum()), np.float32)
            return in_slide[seen], tile.patches(points_px[seen], detector, stain, device), added

        lowest = detector.calibration.uncalibrate(smallest, odds_shift)
        looks = Looks(detector.network, batch_size, detector.views, survey["second_look"], lowest)
        places = place_tiles(grid, tissue, tile_um, shift)[progress.tiles :]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            tiles = tqdm(ahead(pool, look, places, workers), "tiles", total=len(places), leave=False, unit="tile")
            for points_px, patches, added in tiles:
                looks.add(points_px, patches, added)
                progress.tiles += 1
                if progress.tiles % SAVE_EVERY == 0:
                    progress.found += looks.flush()
                    save(progress)
        progress.found += looks.flush()
    found = np.array(sorted(progress.found, key=lambda one: (-one[2], one[1], one[0]))).reshape(-1, 3)
    found[:, 2] = detector.calibration.calibrate(found[:, 2], odds_shift)
    found = found[merge(found[:, :2], found[:, 2], detector.merge_um / um_per_px)]
    return pd.DataFrame(found, columns=["x_px", "y_px", "probability"])


def place_tiles(grid: Grid, tissue: Tissue, tile_um: float, shift: tuple[int, int]) -> list[tuple]:
    """The tiles that hold tissue: their rows and columns of blocks."""
    side = max(1, round(tile_um / (grid.step * grid.um_per_px)))
    starts = (range(-(moved % side), blocks, side) for moved, blocks in zip(shift, grid.shape, strict=True))
    rows, columns = ([(start, start + side) for start in axis] for axis in starts)
    return [(row, column) for row in rows for column in columns if grid.tissue_blocks(tissue, row, column) > 0]


def survey_slide(
    detector: Detector, slide: Slide, grid: Grid, tissue: Tissue, *, batch_size: int, workers: int
) -> dict[str, Any]:
    """What is judged over the whole slide, from squares spread evenly over the tissue; empty where none has a nucleus.

    Returns: stain, as `stain.estimate_stain`; padding_density, as `candidates.measure_candidates`; middle and spread,
    as `candidates.spread_of`, empty with a first look; lowest_score, from which a candidate is looked at; second_look,
    the probability from which it is looked at again; shift_of_odds, as `Calibration.shift_of`.
    """
    side = SURVEY_UM / (grid.step * grid.um_per_px)
    places = place_tiles(grid, tissue, SURVEY_UM, (0, 0))
    blocks = {place: grid.tissue_blocks(tissue, *place) for place in places}
    full = [place for place in places if blocks[place] >= 0.5 * max(1, round(side)) ** 2]
    full = full or sorted(places, key=blocks.__getitem__)[-SURVEYED:]
    if not full:
        return {}
    chosen = [full[index] for index in np.unique(np.linspace(0, len(full) - 1, SURVEYED).round().astype(int))]
    area_mm2 = grid.area_mm2(sum(blocks[place] for place in chosen))
    device = device_of(detector.network)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tiles = list(pool.map(lambda place: Tile(slide, grid, *place), chosen))
        density = np.concatenate(list(pool.map(lambda tile: tissue_density(tile.image), tiles)))
        if not len(density):
            return {}
        stain = estimate_stain(density) if detector.normalise_stain else None
        padding_density = float(np.median(density[:, 0])), float(np.median(density.sum(axis=1)))
        found = list(pool.map(lambda tile: _candidates(detector, tissue, tile, stain, padding_density), tiles))
    scores = [values for _, values in found]
    if not sum(map(len, scores)):
        return {}
    middle = spread = np.zeros(0)
    if detector.first_look is None:
        middle, spread = spread_of(np.concatenate(scores))
        scores = [score_candidates(measures, middle, spread) for measures in scores]
    lowest = _cut(np.concatenate(scores), max(AT_LEAST, int(detector.per_mm2 * area_mm2)))
    first = []
    for tile, (points_px, _), score in zip(tiles, found, scores, strict=True):
        patches = tile.patches(points_px[score >= lowest], detector, stain, device)
        odds = log_odds(detector.network, patches, batch_size).numpy()
        first.append(odds if detector.first_look is None else odds + score[score >= lowest])
    odds = np.concatenate(first)
    return {
        "stain": None if stain is None else stain.tolist(),
        "padding_density": padding_density,
        "middle": middle.tolist(),
        "spread": spread.tolist(),
        "lowest_score": lowest,
        "second_look": _cut(expit(odds), most_seen_again(detector, area_mm2)),
        "shift_of_odds": detector.calibration.shift_of(odds),
    }


def _candidates(
    detector: Detector, tissue: Tissue, tile: Tile, stain: np.ndarray | None, padding_density: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """A tile's own candidates (N, 2), and log odds (N,) of the first look, or measures (N, 4) without one."""
    if detector.first_look is not None:
        return tile.candidates_of(detector, stain, tissue)
    return tile.candidates(padding_density, tissue, search_device(device_of(detector.network)))


class Looks:
    """Scores candidates in whole batches, whatever tile they come from, and the likely ones again in every view.

    views: of test-time augmentation, 1, 2, 4 or 8. second_look: probability from which a candidate is seen again.
    smallest: probability below which it is left out. Both are the network's own, not calibrated.
    """

    def __init__(self, network: CamNetwork, batch_size: int, views: int, second_look: float, smallest: float) -> None:
        self.network, self.batch_size, self.views = network, batch_size, views
        self.rounds = [([0], second_look), (range(1, views), smallest)] if views > 1 else [([0], smallest)]
        self.waiting: list[list[tuple[np.ndarray, torch.Tensor, np.ndarray, np.ndarray]]] = [[] for _ in self.rounds]
        self.found: list[list[float]] = []

    def add(self, points_px: np.ndarray, patches: torch.Tensor, added: np.ndarray) -> None:
        """Take points (N, 2), their patches (N, 3, S, S) uint8 and what to add to their log odds (N,); score what fills
        batches.
        """
        self.waiting[0].append((points_px, patches, added, np.zeros(len(points_px), np.float32)))
        self._score(0, everything=False)

    def _score(self, number: int, everything: bool) -> None:
        """Score what fills batches in a round, or everything; what is likely enough goes to the next round."""
        waits = sum(len(points) for points, *_ in self.waiting[number])
        ready = waits if everything else waits - waits % self.batch_size
        if not ready:
            return
        points, patches, added, odds = zip(*self.waiting[number], strict=True)
        points_px, added, odds = (np.concatenate(each) for each in (points, added, odds))
        patches = torch.cat(patches)
        # Copies free what was scored.
        rest = points_px[ready:].copy(), patches[ready:].clone(), added[ready:].copy(), odds[ready:].copy()
        self.waiting[number] = [rest]
        points_px, patches, added, odds = points_px[:ready], patches[:ready], added[:ready], odds[:ready]
        views, lowest = self.rounds[number]
        seen = log_odds(self.network, patches, self.batch_size, views).numpy() + added
        odds = over_all_views(odds, seen, self.views) if number else seen
        scores = expit(odds)
        stays = np.flatnonzero(scores >= lowest)
        if number + 1 < len(self.rounds):
            later = points_px[stays], patches[torch.from_numpy(stays)], added[stays], odds[stays]
            self.waiting[number + 1].append(later)
            self._score(number + 1, everything=False)
        else:
            self.found += np.column_stack([points_px[stays], scores[stays].astype(float)]).tolist()

    def flush(self) -> list[list[float]]:
        """Score whatever waits; hand out x, y and probability of all found since the last time."""
        for number in range(len(self.rounds)):
            self._score(number, everything=True)
        found, self.found = self.found, []
        return found


def ahead(pool: ThreadPoolExecutor, work: Callable, jobs: Iterable, workers: int) -> Iterator:
    """Results of `work` in the order of the jobs; so many jobs are done ahead as there are threads, and READ_AHEAD."""
    waiting: deque = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= max(1, workers) + READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:  # an interrupted scan does not wait for tiles that nobody takes
            one.cancel()


def _cut(values: np.ndarray, count: int) -> float:
    """The value that the `count` highest reach, a hair lower: in another batch the last one may come out lower."""
    value = float(np.sort(values)[::-1][min(count, len(values)) - 1])
    return value - 1e-4 * abs(value)
