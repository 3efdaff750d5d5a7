"""Nucleus patches cut from a field, at one resolution and, where it is asked for, in one stain."""

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from dasc.errors import InputError
from dasc.images.stain import stain_table
from dasc.model.transfer import upload

CPU = torch.device("cpu")


def resample(image: np.ndarray, um_per_px: float, to_um_per_px: float) -> np.ndarray:
    """A field (H, W, 3) uint8 at another resolution; itself where the sizes agree."""
    height, width = resampled_shape(image, um_per_px, to_um_per_px)
    if (height, width) == image.shape[:2]:
        return image
    interpolation = cv2.INTER_AREA if um_per_px < to_um_per_px else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


def resampled_shape(image: np.ndarray, um_per_px: float, to_um_per_px: float) -> tuple[int, int]:
    """Height and width of a field (H, W, 3) at another resolution."""
    height, width = (max(1, round(side * um_per_px / to_um_per_px)) for side in image.shape[:2])
    return height, width


def taps_of(corner: np.ndarray, size: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """How patches are made along one axis: the pixels of the field that each pixel of a patch is made of, and weights.

    Both (N, size, taps), int64 and float32. Linear interpolation where the field is enlarged, the mean of what a pixel
    covers where it is made smaller. Weights are whole numbers that add up to ONE. Pixels may lie outside the field.

    corner: (N,), place of a patch's first pixel in the resampled field. scale: resampled pixels per pixel of the field.
    """
    at = corner[:, None] + np.arange(size)

    def steady(place: np.ndarray) -> np.ndarray:  # rounded, for a tile counts from another corner than its slide
        return np.round(place * 2**20) / 2**20

    if scale < 1:
        start, end = steady(at / scale), steady((at + 1) / scale)
        taps = np.floor(start)[:, :, None] + np.arange(math.ceil(1 / scale) + 1)
        share = (np.minimum(taps + 1, end[:, :, None]) - np.maximum(taps, start[:, :, None])).clip(min=0) * scale
    else:
        place = steady((at + 0.5) / scale - 0.5)
        taps = np.floor(place)[:, :, None] + np.arange(1 + (scale > 1))
        share = 1 - np.abs(taps - place[:, :, None])
    weights = np.round(share * ONE)
    rest, largest = ONE - weights.sum(axis=2, keepdims=True), weights.argmax(axis=2, keepdims=True)
    np.put_along_axis(weights, largest, np.take_along_axis(weights, largest, axis=2) + rest, axis=2)
    return taps.astype(np.int64), weights.astype(np.float32)


def mirrored(place: np.ndarray, length: int) -> np.ndarray:
    """Places on an axis with so many pixels, those outside mirrored at its ends, the last pixel once more."""
    place = place % (2 * length)
    return np.minimum(place, 2 * length - 1 - place)


ONE = 256  # what the weights of a resampled pixel add up to along an axis; float32 holds ONE x ONE x 255 exactly
TOGETHER = 32  # patches that a CPU resamples at once: its cache holds no more


class PatchCutter:
    """Cuts patches of `size` px at `to_um_per_px` from one field; the field is mirrored beyond its edge.

    Only what is cut is resampled, in whole numbers, so that every device and part of a slide give the same pixels.
    OpenCV, which resamples for `cut_turned`, gives the same to a grey level, two at sharp edges.

    Args:
        image: field (H, W, 3) uint8. um_per_px: its resolution.
        device: where `cut_tensor` cuts if it is a CUDA one, which then gets the field once and not every patch.
        stain: as `stain.apply_stain`, for what is cut.
    """

    def __init__(
        self,
        image: np.ndarray,
        um_per_px: float,
        to_um_per_px: float,
        size: int,
        device: torch.device = CPU,
        stain: np.ndarray | None = None,
    ) -> None:
        self.image, self.size, self.resolutions = image, size, (um_per_px, to_um_per_px)
        height, width = resampled_shape(image, *self.resolutions)
        self.scale = np.array([width / image.shape[1], height / image.shape[0]])
        self.margin = size  # half a patch, and room for the corners of a turned and shifted one
        self.table = None if stain is None else stain_table(stain)
        try:  # mps may copy the field where it takes a few windows
            self.source = upload(torch.from_numpy(image), device if device.type == "cuda" else CPU)
        except torch.OutOfMemoryError as error:
            raise InputError("the device's memory does not hold the field; use --device cpu") from error

    def _in_resampled(self, points_px: np.ndarray) -> np.ndarray:
        return (np.asarray(points_px, dtype=float) + 0.5) * self.scale - 0.5

    def cut(self, points_px: np.ndarray) -> np.ndarray:
        """Patches (N, 3, size, size) uint8 about points (N, 2) of the field, x and y in the field's own pixels."""
        return self.cut_tensor(points_px).cpu().numpy()

    def cut_tensor(self, points_px: np.ndarray) -> Tensor:
        """As `cut`, as a tensor where the cutter cuts."""
        corners = np.round(self._in_resampled(points_px)).astype(int) - self.size // 2
        at_once = TOGETHER if self.source.device == CPU else max(1, len(corners))
        parts = [self._cut(corners[start : start + at_once]) for start in range(0, len(corners), at_once)]
        return torch.cat(parts) if parts else self.source.new_empty(0, 3, self.size, self.size)

    def _cut(self, corners: np.ndarray) -> Tensor:
        """Patches (N, 3, size, size) whose first pixels lie at `corners` (N, 2) of the resampled field."""
        places, matrices = [], []  # across and down
        for axis, length in enumerate(self.image.shape[1::-1]):
            taps, weights = taps_of(corners[:, axis], self.size, self.scale[axis])
            first = taps[:, :1, :1]
            needed = first[:, 0] + np.arange(int((taps - first).max()) + 1)
            places.append(self._there(mirrored(needed, length)))
            matrix = torch.zeros(*taps.shape[:2], needed.shape[1], dtype=torch.float32, device=self.source.device)
            matrices.append(matrix.scatter_(2, self._there(taps - first), self._there(weights))[:, None])
        windows = self._stained(self.source[places[1][:, :, None], places[0][:, None]]).permute(0, 3, 1, 2)
        if (self.scale == 1).all():
            return windows.contiguous()
        across, down = matrices
        return ((down @ windows.to(torch.float32) @ across.mT + ONE**2 // 2) / ONE**2).to(torch.uint8)

    def _there(self, numbers: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(numbers), self.source.device)

    def _stained(self, pixels: Tensor) -> Tensor:
        """Pixels (N, h, w, 3) uint8 as `stain.apply_stain` brings them to one stain."""
        if self.table is None:
            return pixels
        if pixels.device == CPU:
            rows = pixels.reshape(-1, pixels.shape[2], 3).numpy()
            return torch.from_numpy(cv2.LUT(rows, self.table[None])).view(pixels.shape)
        return self._there(self.table)[pixels.long(), torch.arange(3, device=pixels.device)]

    @functools.cached_property
    def padded(self) -> np.ndarray:
        """The whole field, resampled and framed by its mirror image."""
        image = self.image if self.table is None else cv2.LUT(self.image, self.table[None])
        return cv2.copyMakeBorder(resample(image, *self.resolutions), *[self.margin] * 4, cv2.BORDER_REFLECT)

    def cut_turned(self, point_px: np.ndarray, angle: float) -> np.ndarray:
        """One patch (3, size, size) uint8 about a point, turned by `angle` degrees."""
        x, y = self._in_resampled(point_px) + self.margin
        matrix = cv2.getRotationMatrix2D((float(x), float(y)), angle, 1.0)
        matrix[:, 2] += self.size // 2 - np.array([x, y])
        patch = cv2.warpAffine(
            self.padded, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        return patch.transpose(2, 0, 1)

    def place(self, point_px: np.ndarray, centre_px: np.ndarray, angle: float = 0.0) -> np.ndarray:
        """Where a point of the field lies in the patch about `centre_px`: x and y in the patch's pixels."""
        centre = self._in_resampled(centre_px)
        if not angle:
            centre = np.round(centre)
        x, y = self._in_resampled(point_px) - centre
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        return np.array([cos * x + sin * y, cos * y - sin * x]) + self.size // 2


class CutPatch(NamedTuple):
    """One patch to write: centre in the field, annotated point in the patch (NaN without one), uint8 (3, S, S)."""

    label: int
    origin: str
    centre: np.ndarray
    point: np.ndarray
    score: float
    patch: np.ndarray


NO_POINT = np.full(2, np.nan)


def at_point(cutter: PatchCutter, label: int, origin: str, point: np.ndarray) -> CutPatch:
    return CutPatch(label, origin, point, cutter.place(point, point), np.nan, cutter.cut(point[None])[0])


def shifted(cutter: PatchCutter, mitosis: np.ndarray, shape: tuple, args, rng: np.random.Generator) -> CutPatch:
    """A copy of a mitosis, moved and mostly turned."""
    move = rng.uniform(-1, 1, size=2) * args.shift_share * args.patch_size / cutter.scale
    angle = rng.choice([-1, 1]) * rng.uniform(60, 180) if rng.random() < args.turn_probability else 0.0
    centre = np.clip(mitosis + move, 0, np.array([shape[1], shape[0]]) - 1)
    patch = cutter.cut_turned(centre, angle)
    return CutPatch(1, "shifted", centre, cutter.place(mitosis, centre, angle), np.nan, patch)


def negatives(
    cutter: PatchCutter, points_px: np.ndarray, origin: str, scores: np.ndarray | None = None
) -> list[CutPatch]:
    scores = np.full(len(points_px), np.nan) if scores is None else scores
    patches = cutter.cut(points_px)
    return [
        CutPatch(0, origin, *cut) for cut in zip(points_px, [NO_POINT] * len(patches), scores, patches, strict=True)
    ]


def away_from(points_px: np.ndarray, others_px: np.ndarray, radius_px: float) -> np.ndarray:
    """Which points lie farther than the radius from every other point: bool (N,)."""
    if not len(others_px) or not len(points_px):
        return np.ones(len(points_px), dtype=bool)
    return cKDTree(others_px).query(points_px)[0] > radius_px
