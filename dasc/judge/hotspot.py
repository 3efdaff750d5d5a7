"""The hotspot: the place of the window of 2 mm2 that holds the most mitoses."""

from dataclasses import dataclass, replace

import numpy as np

WINDOW_MM2 = 2.0  # area in which mitoses are counted: that of ten high-power fields


@dataclass(frozen=True)
class Hotspot:
    """A window on an image and how many mitoses lie in it.

    x_px, y_px: its upper left corner from the image's, in pixels, as viewers count.
    whole: the window covers the whole image, as the image is not larger than a window.
    """

    x_px: float
    y_px: float
    width_px: float
    height_px: float
    mitoses: int
    whole: bool

    def area_mm2(self, um_per_px: float) -> float:
        """Area of the window; less than WINDOW_MM2 where it is the whole of a smaller image."""
        return self.width_px * self.height_px * um_per_px**2 / 1e6

    def moved_to(self, point_px: tuple[float, float], width_px: int, height_px: int) -> "Hotspot":
        """The window with a point (x, y) in its middle, as far as the image reaches."""
        x = min(max(point_px[0] + 0.5 - self.width_px / 2, 0.0), width_px - self.width_px)
        y = min(max(point_px[1] + 0.5 - self.height_px / 2, 0.0), height_px - self.height_px)
        return replace(self, x_px=x, y_px=y)


def find_hotspot(
    points_px: np.ndarray, width_px: int, height_px: int, um_per_px: float, window_mm2: float = WINDOW_MM2
) -> Hotspot:
    """The window with the most mitoses (N, 2) of an image: exact, over all places, not those of a grid.

    The window is an upright square. Guidelines give the area and leave the shape open; the regions of digital studies
    and of the public challenges are upright rectangles, which a viewer draws and crops, while a circle is the shape
    of one of the microscope's ten fields and not of all ten together. In an image narrower than the square the window
    is as narrow and longer, so that it keeps its area; an image smaller than that is its own window.

    Some best window has a mitosis on its left edge and one on its top edge. So for every mitosis as the left edge,
    those in the strip to the right of it are sorted by y, and a binary search counts how far the window reaches below
    each: O(n^2 log n) in the worst case, much less where few mitoses share a strip. The window returned is moved so
    that what it holds lies in its middle, as far as the image reaches. Of equal ones, the leftmost, then topmost.
    """
    image_mm2 = width_px * height_px * um_per_px**2 / 1e6
    if image_mm2 <= window_mm2:
        return Hotspot(0.0, 0.0, width_px, height_px, len(points_px), True)
    area_px = window_mm2 * 1e6 / um_per_px**2
    wide = min(np.sqrt(area_px), width_px)
    high = min(area_px / wide, height_px)
    wide = area_px / high
    points_px = np.asarray(points_px, float).reshape(-1, 2)
    points_px = points_px[np.lexsort((points_px[:, 1], points_px[:, 0]))]
    most, inside = 0, points_px
    ends = np.searchsorted(points_px[:, 0], points_px[:, 0] + wide, side="right")
    for start, end in enumerate(ends):
        if end - start <= most:
            continue
        strip = points_px[start:end]
        strip = strip[np.argsort(strip[:, 1], kind="stable")]
        reach = np.searchsorted(strip[:, 1], strip[:, 1] + high, side="right") - np.arange(len(strip))
        if reach.max() > most:
            most, top = int(reach.max()), int(reach.argmax())
            inside = strip[top : top + most]
    middle = (inside.min(axis=0) + inside.max(axis=0) + 1) / 2 if most else np.array([width_px, height_px]) / 2
    corner = np.clip(middle - np.array([wide, high]) / 2, 0, np.array([width_px - wide, height_px - high]))
    return Hotspot(float(corner[0]), float(corner[1]), float(wide), float(high), most, False)
