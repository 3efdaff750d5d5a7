"""Cut a slide into tiles such that how it is cut changes nothing that is seen of a nucleus.

Tiles are made of square blocks. A block gives a whole number of pixels at every resolution at which a tile is looked
at, so that resampling a tile gives the pixels that resampling the whole slide would. A tile is read with a margin of
one block, and its own are only the candidates inside.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from dasc.detect.candidates import MARGIN_UM, WORKING_UM_PER_PX, candidates_of, measure_candidates
from dasc.detect.cutter import CPU, PatchCutter
from dasc.images.slides import Slide
from dasc.images.tissue import Tissue
from dasc.model.checkpoint import Detector
from dasc.model.first_look import HALO, MULTIPLE


@dataclass(frozen=True)
class Grid:
    """The blocks of one level of a slide.

    width, height, step: of the level and of a block, in the level's pixels. downsample: the slide's pixels per pixel
    of the level. search_um, model_um: the um/px that the search for candidates and the cutting of patches take the
    level for. Each differs from um_per_px by a few thousandths, so that a block has a whole number of their pixels.
    """

    level: int
    width: int
    height: int
    downsample: float
    um_per_px: float
    step: int
    search_um: float
    model_um: float

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks down and across."""
        return -(-self.height // self.step), -(-self.width // self.step)

    def in_slide(self, points_px: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the level in the slide's own pixels."""
        return (points_px + 0.5) * self.downsample - 0.5

    def area_mm2(self, blocks: float) -> float:
        """Area of so many blocks."""
        return blocks * (self.step * self.um_per_px) ** 2 / 1e6

    def tissue_blocks(self, tissue: Tissue, rows: tuple[int, int], columns: tuple[int, int]) -> float:
        """How many blocks' worth of tissue lies in these blocks (half-open ranges)."""
        scale = self.step * self.downsample / tissue.pixel_px
        (top, bottom), (left, right) = ((int(max(0, a) * scale), int(np.ceil(b * scale))) for a, b in (rows, columns))
        return float(tissue.mask[top:bottom, left:right].sum()) / scale**2


def make_grid(slide: Slide, um_per_px: float, model_um: float, patch_size: int, first_look: bool = False) -> Grid:
    """The grid of the coarsest level that is as fine as the network's resolution.

    um_per_px: of the slide. model_um, patch_size: um/px and side in px of the network's patches. first_look: whether
    the detector has one, which sees farther than the search for candidates, and in steps.
    """
    level = slide.level_for(min(model_um, WORKING_UM_PER_PX) / um_per_px)
    downsample = slide.downsample(level)
    level_um = um_per_px * downsample
    even, margin_um = 2, MARGIN_UM  # the search halves what it searches once more
    if first_look:
        even, margin_um = MULTIPLE, max(MARGIN_UM, HALO * max(WORKING_UM_PER_PX, level_um))
    smallest = int(np.ceil(max(margin_um, patch_size * model_um) / level_um))
    steps = np.arange(smallest, 2 * smallest)
    if first_look and level_um >= WORKING_UM_PER_PX:
        steps = steps[steps % even == 0]
    model_px = np.round(steps * level_um / model_um)
    search_px = steps.astype(float)
    if level_um < WORKING_UM_PER_PX:
        search_px = even * np.round(steps * level_um / WORKING_UM_PER_PX / even)
    model_ums, search_ums = model_px * model_um / steps, search_px * max(WORKING_UM_PER_PX, level_um) / steps
    off = np.maximum(np.abs(model_ums / level_um - 1), np.abs(search_ums / level_um - 1))
    best = int(np.argmin(off.round(3)))
    step, search, model = int(steps[best]), float(search_ums[best]), float(model_ums[best])
    return Grid(level, *slide.levels[level], downsample, level_um, step, search, model)


class Tile:
    """Blocks rows x columns (half-open ranges) of a slide, read with a margin of one block where the slide has one."""

    def __init__(self, slide: Slide, grid: Grid, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        self.grid, self.rows, self.columns = grid, rows, columns
        down, across = grid.shape
        first_row, last_row = max(rows[0] - 1, 0), min(rows[1] + 1, down)
        first_column, last_column = max(columns[0] - 1, 0), min(columns[1] + 1, across)
        self.corner_px = np.array([first_column, first_row]) * grid.step
        left, top = self.corner_px.tolist()
        width = min(last_column * grid.step, grid.width) - left
        height = min(last_row * grid.step, grid.height) - top
        image = slide.read_region(grid.level, left, top, width, height)
        beyond = -height % grid.step, -width % grid.step  # mirrored to whole blocks at the slide's far edges
        self.image = cv2.copyMakeBorder(image, 0, beyond[0], 0, beyond[1], cv2.BORDER_REFLECT) if any(beyond) else image

    def candidates(
        self, padding_density: tuple[float, float], tissue: Tissue, device: torch.device | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Its own candidates on tissue: points (N, 2) in the level's pixels, and measures (N, 4).

        device: of the search, as `candidates.measure_candidates`.
        """
        points_px, measures = measure_candidates(self.image, self.grid.search_um, padding_density, device)
        return self._own(points_px, measures, tissue)

    def candidates_of(
        self, detector: Detector, stain: np.ndarray | None, tissue: Tissue
    ) -> tuple[np.ndarray, np.ndarray]:
        """Its own candidates of the detector's first look on tissue: points (N, 2) in the level's px, log odds (N,).

        stain: as `stain.apply_stain`.
        """
        points_px, odds = candidates_of(detector.first_look, self.image, self.grid.search_um, stain)
        return self._own(points_px, odds, tissue)

    def _own(self, points_px: np.ndarray, values: np.ndarray, tissue: Tissue) -> tuple[np.ndarray, np.ndarray]:
        """Of points (N, 2) in the tile's px those on tissue in its own blocks, in the level's px, and their values."""
        points_px = points_px + self.corner_px
        own = (points_px[:, 0] <= self.grid.width - 0.5) & (points_px[:, 1] <= self.grid.height - 0.5)
        for axis, (first, last) in enumerate((self.columns, self.rows)):
            block = np.floor((points_px[:, axis] + 0.5) / self.grid.step)
            own &= (block >= first) & (block < last)
        own &= tissue.at(self.grid.in_slide(points_px))
        return points_px[own], values[own]

    def patches(
        self, points_px: np.ndarray, detector: Detector, stain: np.ndarray | None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Patches (N, 3, S, S) uint8 for the detector, the stain normalised by `stain`.

        points_px: (N, 2), x and y in the level's pixels. stain: as `stain.apply_stain`.
        device: where they are cut, as `patches.PatchCutter`.
        """
        cutter = PatchCutter(
            self.image, self.grid.model_um, detector.patch_um_per_px, detector.patch_size, device, stain
        )
        # Candidates lie half-way between two pixels of the patch: a hair less, and every tile rounds alike.
        return cutter.cut_tensor(points_px - self.corner_px - 1e-3)
