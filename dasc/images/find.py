"""Find the images in folders, and say what is left out of them and why."""

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dasc.errors import InputError
from dasc.images.parts import dicom_series, parts_of
from dasc.images.read import image_kind, other_kind

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm")

# Why images of a folder are left out.
OWN = "images that DASC wrote"
TILES = "tiles of a viewer"
THUMBNAILS = "thumbnails, labels or overviews of another image"
PARTS = "parts of a slide that is read"
OTHER_FILES = "files that are no images"
THUMBNAIL_FOLDERS = ("thumbs", "thumbnails", "@eadir", "__macosx")  # the last two of network disks and of Macs
THUMBNAIL_NAME = re.compile(r"(?P<of>.+)[-_. ](thumb|thumbnail|label|macro|overview|preview)", re.IGNORECASE)
SCAN_START = b'{\n "settings": {'  # of a scan.json


class Listing(NamedTuple):
    """What there is to read.

    images: files, sorted, each once, of a slide of many files one. skipped: images that cannot be read here, with the
    reason. left_out: how many files of the folders were left out, by the reason.
    """

    images: list[Path]
    skipped: dict[Path, str]
    left_out: Counter[str]

    def words(self) -> str:
        """What was left out in one line; empty where nothing was."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())


def find_images(paths: list[Path]) -> list[Path]:
    """The images of `list_images`; a warning says what else there was."""
    listing = list_images(paths)
    for path, reason in listing.skipped.items():
        logging.getLogger(__name__).warning("skipped %s: %s", path, reason)
    if listing.words():
        logging.getLogger(__name__).warning("left out: %s", listing.words())
    return listing.images


def list_images(paths: list[Path], out: Path | None = None) -> Listing:
    """List the files among `paths` and the images in the folders among them.

    Folders are searched to the bottom, hidden files and folders left out. An image is known by its first bytes; a
    file that only has an image's name is kept, so that reading it names what is broken. Left out are what DASC wrote
    into a folder, tiles of viewers and thumbnails.

    out: the folder that this run writes.
    Raises: InputError: a path is missing, or a folder holds no image.
    """
    found: dict[Path, Path] = {}
    skipped: dict[Path, str] = {}
    left_out: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            images, unread = _search(path, out, left_out)
            if not images and not unread:
                raise InputError(_nothing_in(path, left_out))
            skipped |= unread
        elif path.exists():
            images = [path]
        elif path.is_symlink():
            images, skipped[path] = [], _nowhere(path)
        else:
            raise InputError(f"{path}: no such file or folder")
        for image in images:
            found.setdefault(image.resolve(), image)
    return Listing(_one_of_each_series(sorted(found.values())), skipped, left_out)


def _nothing_in(folder: Path, left_out: Counter[str]) -> str:
    others = Listing([], {}, left_out).words()
    expected = "expected slides, TIFF, PNG, JPEG or BMP files"
    return f"{folder}: no image in this folder; {expected}" + (f"; left out: {others}" if others else "")


def _search(folder: Path, out: Path | None, left_out: Counter[str]) -> tuple[list[Path], dict[Path, str]]:
    """The images below a folder, and those that cannot be read here with the reason; counts what is left out."""
    seen = set()  # device and inode of each folder: links may lead in circles
    images: list[Path] = []
    skipped: dict[Path, str] = {}
    for walked, folders, names in os.walk(folder, followlinks=True):
        here = Path(walked)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if here != folder and (reason := _whole_folder(here, out)):
            folders.clear()
            left_out[reason] += _count_images(here)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_companion(here / name))
        for name in [name for name in folders if name.lower().endswith(".zarr")]:
            skipped[here / name] = "OME-Zarr is not read here; export it as OME-TIFF"
            folders.remove(name)
        files = [here / name for name in sorted(names) if not name.startswith(".")]
        found, others = _sort_files(files, skipped)
        own = _own_names(here, found)
        if own is None:  # what DASC writes beside its images is not worth a count
            left_out[OTHER_FILES] += others
        images += _without_by_products(found, own or set(), left_out)
    left_out += Counter()  # without those of none
    return images, skipped


def _sort_files(files: list[Path], skipped: dict[Path, str]) -> tuple[list[Path], int]:
    """Those that may be images read here, and how many are no images; notes what cannot be read here."""
    images, others = [], 0
    for file in files:
        if not file.exists():
            skipped[file] = _nowhere(file)
        elif _may_be_image(file):
            images.append(file)
        elif reason := _not_read(file):
            skipped[file] = reason
        else:
            others += 1
    return images, others


def _own_names(here: Path, images: list[Path]) -> set[str] | None:
    """Names of the images that DASC wrote into a folder; None where it wrote nothing."""
    names = {"overlay.png", "tissue.png"} if _starts(here / "scan.json", SCAN_START) else None
    if script := _written_by(here):
        plots = {"curve.png"} if script == "predict.py" else {one.name for one in images if one.suffix == ".png"}
        names = (names or set()) | plots
    return names


def _without_by_products(images: list[Path], own: set[str], left_out: Counter[str]) -> list[Path]:
    """The images of one folder without what DASC wrote beside them, thumbnails, and parts of other slides."""
    stems = {one.stem for one in images} | {one.name for one in images}
    parts = {part for one in images if one.suffix.lower() in (".vms", ".vmu") for part in parts_of(one)[1:]}
    kept = []
    for image in images:
        thumbnail = THUMBNAIL_NAME.fullmatch(image.stem)
        if image.name in own:
            left_out[OWN] += 1
        elif thumbnail and thumbnail["of"] in stems:
            left_out[THUMBNAILS] += 1
        elif image in parts:
            left_out[PARTS] += 1
        else:
            kept.append(image)
    return kept


def _whole_folder(here: Path, out: Path | None) -> str | None:
    """Why nothing in a folder is an image to read; None where something may be."""
    if out is not None and here.resolve() == Path(out).resolve():
        return OWN
    if (here / "cut.json").is_file() or (here.suffix == ".partial" and (here / "settings.json").is_file()):
        return OWN  # patches
    deep_zoom = here.name.removesuffix("_files")
    if deep_zoom != here.name and any((here.parent / (deep_zoom + end)).is_file() for end in (".dzi", ".xml")):
        return TILES
    if re.fullmatch(r"TileGroup\d+", here.name) and (here.parent / "ImageProperties.xml").is_file():
        return TILES  # Zoomify
    return THUMBNAILS if here.name.lower() in THUMBNAIL_FOLDERS else None


def _is_companion(folder: Path) -> bool:
    """Whether a folder holds the data of the MRXS slide beside it."""
    return folder.with_name(folder.name + ".mrxs").is_file() and (folder / "Slidedat.ini").is_file()


def _written_by(folder: Path) -> str | None:
    """The script of ours whose run.json lies in a folder; None without one."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return str(run["command"][0]) if {"arguments", "inputs", "versions"} <= run.keys() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _count_images(folder: Path) -> int:
    return sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, names in os.walk(folder) for name in names)


def _may_be_image(path: Path) -> bool:
    if path.suffix.lower() in (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            if image_kind(file) is not None:
                return True
        return dicom_series(path) is not None
    except OSError:
        return False


def _not_read(path: Path) -> str | None:
    """Why an image of another kind is not read; None where it is no image."""
    try:
        with path.open("rb") as file:
            return other_kind(path, file.read(32))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _nowhere(link: Path) -> str:
    return f"a link that leads nowhere (to {link.readlink()}); mend it or remove it" if link.is_symlink() else "gone"


def _starts(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def _one_of_each_series(images: list[Path]) -> list[Path]:
    """Of DICOM files in one folder that belong to one series, the first: OpenSlide reads the others with it."""
    kept: dict[object, Path] = {}
    for image in images:
        try:
            series = dicom_series(image)
        except OSError:  # named when it is read
            series = None
        kept.setdefault((image.parent.resolve(), series) if series else image, image)
    return list(kept.values())
