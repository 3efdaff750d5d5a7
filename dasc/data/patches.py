"""Nucleus patches: cut from a field at one resolution, written as PNG, read into memory."""

import math
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from dasc.errors import InputError
from dasc.files import writing
from dasc.images.read import read_field

PNG = b"\x89PNG\r\n\x1a\n"  # how a patch of write_patch begins
EIGHT_BIT_RGB = b"\x08\x02"  # its header's bytes 24 and 25: bits and kind of colours

CPU = torch.device("cpu")


def resample(image: np.ndarray, um_per_px: float, to_um_per_px: float) -> np.ndarray:
    """A field (H, W, 3) uint8 at another resolution; itself where the sizes agree."""
    scale = um_per_px / to_um_per_px
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


class PatchCutter:
    """Cuts patches of `size` px at `to_um_per_px` from one field; the field is mirrored beyond its edge.

    Args:
        image: field (H, W, 3) uint8. um_per_px: its resolution.
        device: where `cut_tensor` cuts if it is a CUDA one, which then gets the field once and not every patch.
    """

    def __init__(
        self, image: np.ndarray, um_per_px: float, to_um_per_px: float, size: int, device: torch.device = CPU
    ) -> None:
        self.size = size
        small = resample(image, um_per_px, to_um_per_px)
        self.scale = np.array([small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]])
        self.margin = size  # half a patch, and room for the corners of a turned and shifted one
        self.padded = cv2.copyMakeBorder(small, *[self.margin] * 4, cv2.BORDER_REFLECT)
        if device.type != "cuda":  # mps may copy every window of the field where it takes a few
            device = CPU
        try:
            self.windows = torch.from_numpy(self.padded).to(device).unfold(0, size, 1).unfold(1, size, 1)
        except torch.OutOfMemoryError as error:
            raise InputError("the device's memory does not hold the field; use --device cpu") from error

    def _in_padded(self, points_px: np.ndarray) -> np.ndarray:
        return (np.asarray(points_px, dtype=float) + 0.5) * self.scale - 0.5 + self.margin

    def cut(self, points_px: np.ndarray) -> np.ndarray:
        """Patches (N, 3, size, size) uint8 about points (N, 2) of the field, x and y in the field's own pixels."""
        return self.cut_tensor(points_px).cpu().numpy()

    def cut_tensor(self, points_px: np.ndarray) -> Tensor:
        """As `cut`, as a tensor where the cutter cuts."""
        corners = np.round(self._in_padded(points_px)).astype(int) - self.size // 2
        column, row = torch.from_numpy(corners.T.copy()).to(self.windows.device)
        return self.windows[row, column]

    def cut_turned(self, point_px: np.ndarray, angle: float) -> np.ndarray:
        """One patch (3, size, size) uint8 about a point, turned by `angle` degrees."""
        x, y = self._in_padded(point_px)
        matrix = cv2.getRotationMatrix2D((float(x), float(y)), angle, 1.0)
        matrix[:, 2] += self.size // 2 - np.array([x, y])
        patch = cv2.warpAffine(
            self.padded, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        return patch.transpose(2, 0, 1)

    def place(self, point_px: np.ndarray, centre_px: np.ndarray, angle: float = 0.0) -> np.ndarray:
        """Where a point of the field lies in the patch about `centre_px`: x and y in the patch's pixels."""
        centre = self._in_padded(centre_px)
        if not angle:
            centre = np.round(centre)
        x, y = self._in_padded(point_px) - centre
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


def write_patch(path: Path, patch: np.ndarray) -> None:
    """Write a patch (3, S, S) uint8 RGB as PNG, into a folder that takes its place when it is whole."""
    _, data = cv2.imencode(".png", cv2.cvtColor(patch.transpose(1, 2, 0), cv2.COLOR_RGB2BGR))
    with writing(path):
        path.write_bytes(data.tobytes())


def copy_patches(folder: Path, to: Path, patches: Iterable[str]) -> None:
    """Copy patches and, where they are there, cut.json, fields.csv and annotations.csv to another folder.

    Raises:
        InputError: a patch that is gone.
    """
    for patch in tqdm(list(patches), "patches copied", leave=False):
        if not (folder / patch).is_file():
            raise InputError(f"{folder / patch}: patch is gone; cut the patches again")
        (to / patch).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / patch, to / patch)
    for name in ("cut.json", "fields.csv", "annotations.csv"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def read_patch(path: Path) -> np.ndarray:
    """Read a patch as (H, W, 3) uint8 RGB.

    Raises:
        InputError: the file is gone or is not an image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: patch cannot be read ({error.strerror}); cut the patches again") from error
    # OpenCV takes a quarter of the time, but shows broken JPEG, 16 bits and alpha wrong: it is given our own kind only.
    if data and not (data.startswith(PNG) and data[24:26] == EIGHT_BIT_RGB):
        return read_field(path)
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise InputError(f"{path}: patch is not a readable image; cut the patches again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def load_patches(paths: list[Path], workers: int, size: int | None = None) -> Tensor:
    """All patches in memory: (N, 3, S, S) uint8, in the order of `paths`.

    size: S in px as cut.json states it; None: that of the first patch.

    Raises:
        InputError: a patch that is gone, broken, not square or of another size.
    """
    if not paths:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    first = read_patch(paths[0])
    size = first.shape[0] if size is None else size
    patches = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(index: int) -> None:
        patch = read_patch(paths[index])
        if patch.shape != (size, size, 3):
            raise InputError(
                f"{paths[index]}: {patch.shape[1]} x {patch.shape[0]} px, "
                f"expected square patches of one size ({size} px)"
            )
        patches[index] = torch.from_numpy(patch).permute(2, 0, 1)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(read, range(len(paths)), chunksize=64))
    return patches
