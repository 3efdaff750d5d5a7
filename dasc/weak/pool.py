"""A weakly labelled pool: which patches it has, and their features, computed once and kept on disk."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dasc.data.tables import PATCHES, check_once, inside, read_table
from dasc.errors import InputError
from dasc.images.find import find_images
from dasc.model.inference import embed_patches
from dasc.model.network import CamNetwork
from dasc.weak.duplicates import THUMBNAIL_PX, thumbnail
from dasc.weak.named import FORM, read_square, slide_of

POOL = {"patch": str, "case": str}  # columns of a pool manifest; those of patches.csv are used where they stand


def read_pool(path: Path, unknown_slides: bool) -> tuple[Path, pd.DataFrame]:
    """The patches of a pool: the folder their paths are relative to, and a row per patch.

    path: a folder of images whose names state the slide, or a CSV with the columns patch and case, such as a
    patches.csv; its positives are left out.
    unknown_slides: take patches of unknown slide too, as case "".
    Returns: the table has the columns patch, case, image, x_px, y_px (NaN where unknown).
    Raises: InputError: no such pool, an empty one, a patch twice, one without a slide.
    """
    advice = f"expected {FORM}, with or without pos_ or neg_, or a CSV with the columns patch and case"
    if path.is_dir():
        folder, files = path, find_images([path])
        table = pd.DataFrame({"patch": [file.relative_to(path).as_posix() for file in files]})
        table["case"] = [slide_of(file) for file in files]
    else:
        folder, advice = path.parent, "fill in the column case"
        table = read_table(path, POOL, "python pre/cut_patch_2.py")
        columns = pd.read_csv(path, nrows=0, encoding="utf-8").columns
        table = read_table(path, {name: kind for name, kind in PATCHES.items() if name in columns}, "")
        check_once(table["patch"], path)
        if "label" in table:
            table = table[table["label"] == 0].reset_index(drop=True)
        for patch in table["patch"]:
            inside(patch, path)
    if table.empty:
        raise InputError(f"{path}: the pool is empty; expected at least one patch that is not labelled positive")
    slideless = table["patch"][table["case"] == ""]
    if len(slideless) and not unknown_slides:
        raise InputError(
            f"{path}: {len(slideless)} of {len(table)} pool patches state no slide (first: {slideless.iloc[0]}); "
            f"{advice}; --unknown_slides True takes them, and then only the near-duplicate test keeps val and test "
            "tissue out"
        )
    for column, value in (("image", table["case"]), ("x_px", np.nan), ("y_px", np.nan)):
        if column not in table:
            table[column] = value
    return folder, table[["patch", "case", "image", "x_px", "y_px"]]


class PoolFeatures:
    """Records of pool patches in one file: features (float16), p(positive) and a thumbnail of each.

    Records are only ever appended, each with the key of its patch: an interrupted run goes on where it stopped, and a
    pool that has grown computes what is new. The file belongs to one network, whose hash its name holds.
    """

    def __init__(self, folder: Path, model_sha256: str, width: int) -> None:
        self.path = Path(folder) / f"{model_sha256[:16]}.records"
        self.type = np.dtype(
            [("key", "u8"), ("score", "f4"), ("thumbnail", "u1", (THUMBNAIL_PX,) * 2), ("features", "f2", (width,))]
        )
        self.rows = np.empty(0, dtype=np.int64)  # the record of each patch of the pool that was embedded last

    def embed(
        self, network: CamNetwork, folder: Path, patches: list[str], sizes: tuple[int, int], batch: int, workers: int
    ) -> None:
        """Compute the records that are missing, and find those of `patches`.

        patches: paths relative to `folder`. sizes: side in px as they are on disk, and as the network takes them.
        batch: patches embedded together. workers: threads that read.
        Raises: InputError: a patch that cannot be read or has another size; records so far are kept.
        """
        keys = np.array([_key(folder, patch) for patch in patches], dtype=np.uint64)
        missing = np.flatnonzero(~np.isin(keys, self._keys()))
        if len(missing):
            try:
                self._append(network, keys, missing, _batches(folder, patches, missing, sizes, batch, workers))
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        known = self._keys()
        order = np.argsort(known, kind="stable")
        self.rows = order[np.searchsorted(known, keys, sorter=order)]

    def _append(self, network: CamNetwork, keys: np.ndarray, missing: np.ndarray, batches: Iterator) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file, tqdm(total=len(missing), desc="pool", unit="patch") as progress:
            file.truncate(file.tell() // self.type.itemsize * self.type.itemsize)  # a killed run's half record
            for part, images in batches:
                records = np.zeros(len(part), dtype=self.type)
                records["key"] = keys[part]
                records["thumbnail"] = [thumbnail(image) for image in images]
                pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
                records["features"], records["score"] = embed_patches(network, pixels, len(pixels))
                file.write(records.tobytes())
                file.flush()
                progress.update(len(part))
            os.fsync(file.fileno())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Features (stop - start, C) of the records from start to stop."""
        size = self.type.itemsize
        return np.fromfile(self.path, self.type, count=stop - start, offset=start * size)["features"]

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Features (R, C) of these records."""
        return self._records()["features"][rows]

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """p(positive) (R,) of these records."""
        return self._records()["score"][rows]

    def thumbnails(self, rows: np.ndarray) -> np.ndarray:
        """Thumbnails (R, 16, 16) uint8 of these records."""
        return self._records()["thumbnail"][rows]

    def __len__(self) -> int:
        """Records in the file, those of other pools too."""
        return self.path.stat().st_size // self.type.itemsize if self.path.is_file() else 0

    def _records(self) -> np.ndarray:
        return np.memmap(self.path, self.type, mode="r", shape=(len(self),))

    def _keys(self) -> np.ndarray:
        return np.array(self._records()["key"]) if len(self) else np.empty(0, dtype=np.uint64)


def _key(folder: Path, patch: str) -> int:
    """64 bits that change with a patch's name, size and time of writing."""
    try:
        status = (folder / patch).stat()
    except OSError as error:
        raise InputError(f"{folder / patch}: pool patch cannot be read ({error.strerror})") from error
    text = f"{patch}\0{status.st_size}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _batches(
    folder: Path, patches: list[str], rows: np.ndarray, sizes: tuple[int, int], batch: int, workers: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Rows and their images, one batch at a time; the next two are read meanwhile."""

    def read(row: int) -> np.ndarray:
        try:
            return read_square(folder / patches[row], *sizes)
        except InputError as error:
            raise InputError(f"pool patch {error}; mend it or take it out of the pool, and run again") from error

    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    with ThreadPoolExecutor(max(1, workers)) as threads:
        ahead = deque()
        try:
            for part in [*parts, None, None]:
                if part is not None:
                    ahead.append((part, threads.map(read, part)))
                if ahead and (part is None or len(ahead) > 2):
                    waiting, images = ahead.popleft()
                    yield waiting, list(images)
        finally:
            threads.shutdown(cancel_futures=True)
