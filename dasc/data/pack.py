"""The patches of a folder in one file, patches.npy, which trainings map: they begin at once and share its memory.

patches.npy is an array (N, 3, S, S) uint8 in NumPy's format, in the order of patches.csv: `numpy.load` maps it. Two
more arrays follow: size in bytes and time of change in ns of every PNG file as it was packed, (N, 2) int64, and the
patches' names, between null bytes. The PNG files are what counts: a patch that is not in the pack, or whose file has
another size or time now, is read from its file. So whoever edits the folder or patches.csv need not care for the pack.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dasc.data.patches import load_patches, read_patch
from dasc.files import replacing, spelt_out

PACK = "patches.npy"
PIECE = 1024  # patches packed or moved to a device at a time
GONE = (-1, -1)  # size and time of a file that is not there


class MappedPatches:
    """Patches (N, 3, S, S) uint8 on disk: what is indexed is read, as a tensor of its own in the CPU's memory.

    It can do what trainings ask of such a tensor. The mapped memory itself is never handed out: it cannot be written.

    Args:
        pages: the mapped patches (M, 3, S, S). loose: patches (L, 3, S, S) that are not among them, in memory.
        rows: (N,) int64, the place of each patch among the pages, or M and more: among the loose ones.
    """

    device = torch.device("cpu")

    def __init__(self, pages: np.ndarray, loose: Tensor, rows: Tensor) -> None:
        self.pages, self.loose, self.rows = pages, loose, rows
        self.shape = torch.Size((len(rows), *pages.shape[1:]))
        self.nbytes = math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor | np.ndarray) -> Tensor:
        rows = self.rows[index]
        patches = torch.from_numpy(self.pages[rows.clamp(max=len(self.pages) - 1).numpy()])
        loose = rows >= len(self.pages)
        if loose.any():
            patches[loose] = self.loose[rows[loose] - len(self.pages)]
        return patches

    def split(self, size: int) -> Iterator[Tensor]:
        """All patches, so many at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def part(self, rows: slice) -> "MappedPatches":
        """Some of the patches, on disk as they are."""
        return MappedPatches(self.pages, self.loose, self.rows[rows])

    def to(self, device: torch.device) -> Tensor:
        """All patches on a device, read once."""
        whole = torch.empty(self.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self), PIECE):
            whole[start : start + PIECE] = self[start : start + PIECE]
        return whole


def write_pack(folder: Path, names: list[str], workers: int) -> None:
    """Write the patches of a folder, all of the first one's size, to its patches.npy.

    Raises:
        InputError: as `load_patches`; WriteError: a full disk, which leaves no half of it.
    """
    size = read_patch(folder / names[0]).shape[0]
    stamps = np.array([_stamp(folder / name) for name in names], dtype=np.int64).reshape(-1, 2)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), 3, size, size)}
    with replacing(folder / PACK) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(names), PIECE), f"{PACK}, {PIECE} patches each", leave=False):
            paths = [folder / name for name in names[start : start + PIECE]]
            file.write(load_patches(paths, workers, size).numpy().data)
        np.lib.format.write_array(file, stamps)
        joined = "\0".join(names).encode("utf-8", "surrogateescape")
        np.lib.format.write_array(file, np.frombuffer(joined, dtype=np.uint8))


def open_patches(folder: Path, names: list[str], workers: int, size: int) -> Tensor | MappedPatches:
    """Patches of a folder in the order of their names: mapped where the folder has a pack, else in memory.

    Patches that the pack does not hold as they are now are read from their files, and it is said.
    size: S in px as cut.json states it. Raises: InputError: as `load_patches`.
    """
    path, paths = folder / PACK, [folder / name for name in names]
    if not names or not path.is_file():
        return load_patches(paths, workers, size)
    remedy = f"`python pre/split_patches.py --labelled {folder / 'patches.csv'}` makes a copy with a new {PACK}"
    try:
        pages, stamps, packed = _map(path, size)
    except Exception:  # NumPy's readers of a broken file raise anything
        print(f"{path}: no whole pack of patches of {size} px, so their own files are read; {remedy}")
        return load_patches(paths, workers, size)
    place = {name: row for row, name in enumerate(packed)}
    rows = np.array([place.get(name, -1) for name in names])
    now = np.array([_stamp(one) for one in paths], dtype=np.int64)
    loose = np.flatnonzero((rows < 0) | (stamps[rows] != now).any(axis=1))
    if len(loose):
        print(
            f"{path}: {len(loose)} of {len(names)} patches are not in it or have changed since (first: "
            f"{spelt_out(names[loose[0]])}), so their own files are read; {remedy}"
        )
        rows[loose] = len(pages) + np.arange(len(loose))
    return MappedPatches(pages, load_patches([paths[row] for row in loose], workers, size), torch.from_numpy(rows))


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file; GONE without one."""
    try:
        found = path.stat()
    except OSError:
        return GONE
    return found.st_size, found.st_mtime_ns


def _map(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The mapped patches (M, 3, S, S) of a pack, their files' sizes and times (M, 2), their names.

    Mapped for reading: a copy-on-write map, which torch takes without a warning, counts against the memory, and Linux
    refuses it where it is larger than that. Raises: ValueError or another: the file is not whole, or is another.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape[1:] != (3, size, size) or shape[0] < 1 or dtype != np.uint8:
            raise ValueError("an array of another kind")
        start = file.tell()
        file.seek(math.prod(shape), 1)
        stamps = np.lib.format.read_array(file)
        names = np.lib.format.read_array(file).tobytes().decode("utf-8", "surrogateescape").split("\0")
    if stamps.shape != (shape[0], 2) or stamps.dtype != np.int64 or len(names) != shape[0]:
        raise ValueError("lists of another length")
    return np.asarray(np.memmap(path, np.uint8, "r", start, shape)), stamps, names
