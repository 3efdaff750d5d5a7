"""Nucleus patches: written as PNG, read into memory."""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dasc.errors import InputError
from dasc.files import writing
from dasc.images.read import read_field

PNG = b"\x89PNG\r\n\x1a\n"  # how a patch of write_patch begins
EIGHT_BIT_RGB = b"\x08\x02"  # its header's bytes 24 and 25: bits and kind of colours


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
