"""A first look at work: a field to its map of log odds, and a map to its peaks.

A field is computed step by step, every step window by window. Each step needs only its own receptive field round a
window: less is computed twice than with windows for the whole network, and the finest maps stay in a core's cache.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from dasc.errors import InputError
from dasc.model.augment import to_float
from dasc.model.first_look import MULTIPLE, STRIDE, Step
from dasc.model.inference import device_of, on_cores
from dasc.model.transfer import upload

DEVICE_WINDOW = 2048  # px: side of what a device other than a CPU computes at once, without its halo; with it 1 GB


def odds_map(network: nn.Module, field: np.ndarray, cores: int = 1) -> np.ndarray:
    """Log odds (ceil(H / STRIDE), ceil(W / STRIDE)) float32 of a field (H, W, 3) uint8, step by step.

    network: has the `steps` of a first look. cores: threads that compute windows side by side, on a CPU.
    Raises: InputError: a device whose memory does not hold the field's maps.
    """
    height, width = field.shape[:2]
    framed = cv2.copyMakeBorder(field, 0, -height % MULTIPLE, 0, -width % MULTIPLE, cv2.BORDER_REFLECT)
    steps = network.steps()
    try:
        maps = {1: upload(torch.from_numpy(framed), device_of(network)).permute(2, 0, 1)}  # by px per cell
        with on_cores(min(cores, len(_windows(steps[0], maps[1])))) as each:
            for step in steps:
                maps[step.gives] = made = _take(step, maps, each)
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory does not hold the maps of the field; use --device cpu") from error
    return made[0, : -(-height // STRIDE), : -(-width // STRIDE)].float().cpu().numpy()


def _take(step: Step, maps: dict[int, Tensor], each: Callable) -> Tensor:
    """The map (channels, h, w) that a step makes of maps (C, h, w), the field's the first of them.

    each: a `map` over windows.
    """
    field = maps[1]
    dtype = torch.bfloat16 if field.is_cuda else torch.float32
    made = field.new_empty((step.channels, *(side // step.gives for side in field.shape[1:])), dtype=dtype)

    @torch.inference_mode()  # here: it is a thread's own
    def compute(window: tuple[slice, slice]) -> None:
        around = [slice(max(0, part.start - step.halo), part.stop + step.halo) for part in window]
        given = [maps[px][None, :, *(_cells(part, 0, px) for part in around)] for px in step.reads]
        with torch.autocast(field.device.type, torch.bfloat16, enabled=field.is_cuda):
            found = step.network(*(to_float(part) if part.dtype == torch.uint8 else part for part in given))
        inside = (_cells(part, whole.start, step.gives) for part, whole in zip(window, around, strict=True))
        made[:, *(_cells(part, 0, step.gives) for part in window)] = found[0, :, *inside]

    each(compute, _windows(step, field))
    return made


def _windows(step: Step, field: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of a field (C, H, W) that are computed at once, without their halo."""
    largest = step.window if field.device.type == "cpu" else DEVICE_WINDOW
    rows, columns = (_parts(side, largest) for side in field.shape[1:])
    return [(row, column) for row in rows for column in columns]


def _parts(side: int, largest: int) -> list[slice]:
    """A side (px, a multiple of MULTIPLE) in equal parts of so many px at most."""
    step = -(-side // -(-side // largest) // MULTIPLE) * MULTIPLE
    return [slice(start, min(start + step, side)) for start in range(0, side, step)]


def _cells(part: slice, start: int, px: int) -> slice:
    """The cells of so many px of a part of a side, px, counted from `start`."""
    return slice((part.start - start) // px, (part.stop - start) // px)


def peaks(odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The peaks of a map (h, w): points (N, 2), x and y in px of the field, and their log odds (N,), highest first.

    A peak is not below its eight neighbours and above one of them. It lies where parabolas through it and its
    neighbours are highest, at most half a cell away.
    """
    square = np.ones((3, 3), np.uint8)
    row, column = np.nonzero((odds >= cv2.dilate(odds, square)) & (odds > cv2.erode(odds, square)))
    order = np.argsort(-odds[row, column], kind="stable")
    row, column = row[order], column[order]
    framed = np.pad(odds, 1, mode="edge")
    beside = (
        (framed[row + 1, column], framed[row + 1, column + 2]),
        (framed[row, column + 1], framed[row + 2, column + 1]),
    )
    peak, cells = odds[row, column], np.stack([column, row], axis=1).astype(float)
    for axis, (before, after) in enumerate(beside):
        bend = np.maximum(2 * peak - before - after, 1e-6)
        cells[:, axis] += np.clip((after - before) / (2 * bend), -0.5, 0.5)
    return cells * STRIDE + (STRIDE - 1) / 2, peak
