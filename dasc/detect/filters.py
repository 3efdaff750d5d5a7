"""The filters of the candidate search, by OpenCV on the CPU and by torch on a device: the same numbers up to rounding.

Each takes an image (h, w) float32, a NumPy array or a tensor on any device, and returns its kind. On a CPU OpenCV takes
a twentieth of the time of torch, and on a GPU it does not run.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Image = np.ndarray | Tensor


def to_device(image: np.ndarray, device: torch.device | None) -> Image:
    """A NumPy array as it is where the device is None, else as a tensor on the device."""
    return image if device is None else torch.from_numpy(image).to(device)


def to_numpy(image: Image) -> np.ndarray:
    """The values of an array or a tensor in the CPU's memory."""
    return image if isinstance(image, np.ndarray) else image.cpu().numpy()


def at(image: Image, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Values (N,) at places, in the CPU's memory."""
    if isinstance(image, np.ndarray):
        return image[row, column]
    row, column = (torch.from_numpy(place).to(image.device) for place in (row, column))
    return image[row, column].cpu().numpy()


def look_up(table: np.ndarray, image: Image) -> Image:
    """The entry (256,) of each grey level of an image (h, w) uint8."""
    if isinstance(image, np.ndarray):
        return table[image]
    return torch.from_numpy(table).to(image.device)[image.int()]


def smooth(image: Image, sigma: float) -> Image:
    """Gaussian of `sigma` px; mirrored at the edge, the outermost pixel once."""
    if isinstance(image, np.ndarray):
        return cv2.GaussianBlur(image, (0, 0), sigma)
    size = round(8 * sigma + 1) | 1  # as OpenCV chooses it
    weights = cv2.getGaussianKernel(size, sigma).ravel().tolist()
    # Sums of shifted copies, not a convolution, which a GPU may compute with the ten bits of TensorFloat-32.
    for axis in (1, 0):
        count = image.shape[axis]
        mirrored = torch.from_numpy(np.pad(np.arange(count), size // 2, mode="reflect")).to(image.device)
        framed = image.index_select(axis, mirrored)
        image = torch.zeros_like(image)
        for shift, weight in enumerate(weights):
            image.add_(framed.narrow(axis, shift, count), alpha=weight)
    return image


def highest(image: Image, shape: np.ndarray) -> Image:
    """The highest value about every pixel within a shape (2 r + 1, 2 r + 1) uint8, whose rows are centred runs of 1."""
    if isinstance(image, np.ndarray):
        return cv2.dilate(image, shape)
    (height, width), radius = image.shape, shape.shape[0] // 2
    framed = F.pad(image[None, None], [radius] * 4, value=-torch.inf)
    result = torch.full_like(image, -torch.inf)
    for row, run in enumerate(shape.sum(axis=1).tolist()):
        first = radius - run // 2
        strip = framed[:, :, row : row + height, first : first + width + run - 1]
        torch.maximum(result, F.max_pool2d(strip, (1, run), stride=1)[0, 0], out=result)
    return result


def lowest(image: Image, shape: np.ndarray) -> Image:
    """The lowest value within a shape, as `highest`."""
    return cv2.erode(image, shape) if isinstance(image, np.ndarray) else -highest(-image, shape)


def shrink(image: Image, height: int, width: int) -> Image:
    """An image at a smaller size, each pixel the mean of the area it covers."""
    if isinstance(image, np.ndarray):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    down, across = (
        torch.from_numpy(_shares(*sizes)).to(image.device)
        for sizes in ((image.shape[0], height), (image.shape[1], width))
    )
    return down @ image @ across.T


def enlarge(image: Image, height: int, width: int) -> Image:
    """An image at a larger size, linear between its pixels."""
    if isinstance(image, np.ndarray):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return F.interpolate(image[None, None], (height, width), mode="bilinear")[0, 0]


def _shares(size: int, smaller: int) -> np.ndarray:
    """Share of every pixel of a row in each pixel of a smaller row, (smaller, size) float32; they sum to 1."""
    edges = np.arange(smaller + 1)[:, None] * (size / smaller)
    pixel = np.arange(size)
    covered = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return (covered.clip(0) * (smaller / size)).astype(np.float32)
