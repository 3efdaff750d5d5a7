"""Pictures of the cells of a queue, read by region from the images that they come from."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pandas as pd

from dasc.errors import InputError
from dasc.images.slides import Slide, open_slide, read_overview, read_square

CROP_UM, CONTEXT_UM = 32, 256  # tissue that a crop and its surroundings show
SIDE_PX = {CROP_UM: 192, CONTEXT_UM: 640}  # of their pictures
OVERVIEW_PX = 320  # longest side of the picture of a whole image
PAGE = 24  # cells of the gallery's page
QUALITY, ROUGH = 90, 70  # of the JPEGs: of crops, and of the larger pictures, that a page to be sent is mostly made of
OPEN_SLIDES = 64  # held open at the same time
OPEN_PX = 200_000_000  # fewer where those held in memory have more pixels than this: 0.6 GB
KEPT = 600  # pictures kept: some 10 MB of crops
MARK = (0, 150, 0)


class Crops:
    """Pictures of the cells of a queue, as JPEG. Safe to call from several threads. Close it, or use it as a context.

    queue: a table of queue.csv.
    """

    def __init__(self, queue: pd.DataFrame) -> None:
        self._cells = list(queue.itertuples(index=False))
        self._slides: OrderedDict[str, Slide] = OrderedDict()
        self._pictures: OrderedDict[tuple, bytes] = OrderedDict()
        self._lock = threading.RLock()  # of the slides: whoever reads one holds it
        self._keeping = threading.Lock()  # of the pictures, for an instant only: what is drawn is not waited for
        self._ahead = ThreadPoolExecutor(1)
        self._page = -1
        self._ahead.submit(self._load, range(PAGE))

    def crop(self, item: int, um: int = CROP_UM) -> bytes:
        """The cell in the middle of `um` (a key of SIDE_PX) of tissue, turned as the queue says.

        Raises:
            InputError: its image is gone or broken.
        """
        picture = self._kept((item, um), lambda: self._square(item, um))
        if um == CROP_UM and item // PAGE != self._page:
            self._page = item // PAGE
            self._ahead.submit(self._load, range((self._page + 1) * PAGE, (self._page + 2) * PAGE))
        return picture

    def overview(self, item: int) -> bytes:
        """The whole image with a mark at the cell. Raises as `crop`."""
        cell = self._cells[item]
        with self._lock:
            small = self._kept(("image", cell.path), lambda: self._small(cell.path))
            slide = self._slide(cell.path)
            width, height = slide.width, slide.height
        picture = imagecodecs.jpeg8_decode(small)
        place = (
            round((cell.x_px + 0.5) * picture.shape[1] / width),
            round((cell.y_px + 0.5) * picture.shape[0] / height),
        )
        cv2.circle(picture, place, 8, (255, 255, 255), 4, cv2.LINE_AA)
        cv2.circle(picture, place, 8, MARK, 2, cv2.LINE_AA)
        return _encode(picture, ROUGH)

    def close(self) -> None:
        """Close the slides."""
        self._ahead.shutdown(cancel_futures=True)
        with self._lock:
            while self._slides:
                self._slides.popitem()[1].close()

    def __enter__(self) -> "Crops":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kept(self, key: tuple, draw: Callable[[], bytes]) -> bytes:
        """A picture that was drawn before, or is drawn now."""
        picture = self._find(key)
        if picture is None:
            with self._lock:
                picture = self._find(key) or draw()  # while this thread waited another may have drawn it
            with self._keeping:
                self._pictures[key] = picture
                while len(self._pictures) > KEPT:
                    self._pictures.popitem(last=False)
        return picture

    def _find(self, key: tuple) -> bytes | None:
        with self._keeping:
            if key in self._pictures:
                self._pictures.move_to_end(key)
            return self._pictures.get(key)

    def _load(self, items: range) -> None:
        """Draw the crops of a page before it is asked for; whatever goes wrong is said when it is."""
        for item in items:
            if item < len(self._cells):
                try:
                    self._kept((item, CROP_UM), lambda item=item: self._square(item, CROP_UM))
                except Exception:
                    return

    def _square(self, item: int, um: int) -> bytes:
        cell = self._cells[item]
        picture = read_square(self._slide(cell.path), cell.x_px, cell.y_px, um / cell.um_per_px, SIDE_PX[um])
        return _encode(turned(picture, cell.turn), QUALITY if um == CROP_UM else ROUGH)

    def _small(self, path: str) -> bytes:
        slide = self._slide(path)
        overview, _ = read_overview(slide, max(1.0, max(slide.width, slide.height) / OVERVIEW_PX), 1)
        scale = min(1.0, OVERVIEW_PX / max(overview.shape))
        size = [max(1, round(side * scale)) for side in overview.shape[1::-1]]
        return _encode(cv2.resize(overview, size, interpolation=cv2.INTER_AREA))

    def _slide(self, path: str) -> Slide:
        """The open slide; those asked for longest ago are closed."""
        if path not in self._slides:
            self._slides[path] = open_slide(Path(path))
        self._slides.move_to_end(path)
        while len(self._slides) > 1 and (len(self._slides) > OPEN_SLIDES or self._held_px() > OPEN_PX):
            self._slides.popitem(last=False)[1].close()
        return self._slides[path]

    def _held_px(self) -> int:
        return sum(one.width * one.height for one in self._slides.values() if one.reader == "memory")


def check_images(queue: pd.DataFrame) -> None:
    """Say which images of a queue are gone; InputError where all of them are."""
    paths = queue["path"].drop_duplicates().tolist()
    gone = [path for path in paths if not Path(path).is_file()]
    if len(gone) == len(paths):
        raise InputError(f"none of the {len(paths)} images is there (first: {gone[0]}); --data_root names their folder")
    if gone:
        print(f"{len(gone)} of {len(paths)} images are gone, the first {gone[0]}: X passes over their cells")


def turned(picture: np.ndarray, turn: int) -> np.ndarray:
    """A square (S, S, 3) turned by `turn` % 4 quarters, and mirrored where `turn` is 4 or more."""
    picture = np.rot90(picture, turn % 4)
    return np.ascontiguousarray(picture[:, ::-1] if turn >= 4 else picture)


def _encode(picture: np.ndarray, quality: int = QUALITY) -> bytes:
    """An RGB picture as JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[
        1
    ].tobytes()
