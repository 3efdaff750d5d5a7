"""The tiles that a first look learns from: squares of annotated fields, with a map of where the mitoses are."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dasc.model.first_look import STRIDE

SIDE = 192  # px of a tile
CELLS = SIDE // STRIDE
DRAWN_AT = (0, 0, 0, 1, 2, 2)  # of six tiles: 0 at a mitosis, 1 at an annotated negative, 2 anywhere
ROUND_CELLS = 1.2  # Gaussian round a centre in which a high p costs less, in cells: an annotation is not exact
UNSURE_CELLS = 4.0  # round a nucleus that readers could not name nothing counts
ZOOM = 1.15  # a tile is magnified by this at most, or reduced by it
OFF_CENTRE = 0.4  # what a tile is drawn for lies this far from its middle at most, in parts of the side


class LookField(NamedTuple):
    """An annotated field as a first look sees it: (H, W, 3) uint8, and of its nuclei points (N, 2), x and y in px."""

    image: np.ndarray
    mitoses: np.ndarray
    negatives: np.ndarray
    unsure: np.ndarray


class LookTiles:
    """Draws tiles, in turn as DRAWN_AT says.

    Every mm2 of field is as likely, at a mitosis of those that have one: sets of many small pictures and of few large
    fields take part by what they show.
    """

    def __init__(self, fields: list[LookField]) -> None:
        self.fields = fields
        areas = np.array([field.image.shape[0] * field.image.shape[1] for field in fields], float)
        shares = [areas * [bool(len(points)) for points in column] for column in zip(*fields, strict=True)][1:3]
        self.shares = [share / share.sum() if share.any() else areas / areas.sum() for share in (*shares, areas)]

    def draw(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tiles (number, 3, SIDE, SIDE) uint8, maps (number, CELLS, CELLS) and where they count, for `focal_loss`."""
        kinds = [DRAWN_AT[place % len(DRAWN_AT)] for place in range(number)]
        tiles, maps, counts = zip(*(self._one(kind, rng) for kind in kinds), strict=True)
        tiles = np.stack(tiles).transpose(0, 3, 1, 2)
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (tiles, np.stack(maps), np.stack(counts)))

    def _one(self, kind: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        field = self.fields[rng.choice(len(self.fields), p=self.shares[kind])]
        points = (field.mitoses, field.negatives, ())[kind]
        anywhere = rng.uniform(size=2) * field.image.shape[1::-1]
        middle = points[rng.integers(len(points))] if len(points) else anywhere
        zoom = ZOOM ** rng.uniform(-1, 1)
        corner = middle + rng.uniform(-OFF_CENTRE, OFF_CENTRE, 2) * SIDE / zoom - SIDE / zoom / 2
        matrix = np.array([[zoom, 0, -zoom * corner[0]], [0, zoom, -zoom * corner[1]]])
        tile = cv2.warpAffine(field.image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        inside = cv2.warpAffine(np.ones(field.image.shape[:2], np.uint8), matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
        counts = inside[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE] > 0
        mitoses, unsure = (
            ((each - corner) * zoom - (STRIDE - 1) / 2) / STRIDE for each in (field.mitoses, field.unsure)
        )
        wanted = np.exp(-(_distance(np.rint(mitoses)) ** 2) / (2 * ROUND_CELLS**2)).astype(np.float32)
        counts &= _distance(unsure) > UNSURE_CELLS
        turns, mirrored = rng.integers(4), rng.integers(2)
        return tuple(np.rot90(part[:, ::-1] if mirrored else part, turns) for part in (tile, wanted, counts))


def _distance(points: np.ndarray) -> np.ndarray:
    """How far every cell (CELLS, CELLS) of a tile is from the nearest of the points (N, 2), in cells."""
    row, column = np.mgrid[:CELLS, :CELLS]
    distances = [np.hypot(column - x, row - y) for x, y in points if -CELLS < x < 2 * CELLS and -CELLS < y < 2 * CELLS]
    return np.min(distances, axis=0) if distances else np.full((CELLS, CELLS), np.inf)
