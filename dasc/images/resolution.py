"""The um/px of an image: what its file states, what a table or the user says, and which of them counts."""

import html
import math
import re
from pathlib import Path
from typing import NamedTuple

import tifffile

from dasc.errors import InputError
from dasc.images.read import UM_PER_PX_RANGE, image_kind, reason
from dasc.images.tiffs import full_page

CONTRADICTS = 0.05  # two resolutions that differ by this share or more are not the same
SQUARE = 0.01  # largest difference of the two sides of a pixel
OME_DEFAULT = "µm"
UNITS_UM = {  # um per unit, as OME and ImageJ write them
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", "micrometre", "\\u00b5m"), 1.0),
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25400.0,
    "inch": 25400.0,
}
TAG_UNITS_UM = {2: 25400.0, 3: 10000.0}  # of ResolutionUnit

WORDS = {"dataset": "the dataset states", "file": "the file states", "flag": "the flag says"}


class Stated(NamedTuple):
    """What a file states: um/px, None where that is nothing to go by; note: what is odd about it, else empty."""

    um_per_px: float | None
    note: str = ""


class Resolution(NamedTuple):
    """The um/px of an image, where it comes from (`dataset`, `file` or `flag`), and what contradicts it, else empty."""

    um_per_px: float
    source: str
    note: str


def read_um_per_px(path: Path) -> float | None:
    """The um/px of `read_stated`."""
    return read_stated(path).um_per_px


def read_stated(path: Path) -> Stated:
    """What a TIFF states of its resolution: OME, ImageJ or Aperio in its text, else its resolution tags.

    Raises: InputError naming the file when it is missing or broken.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if image_kind(file) != "tiff":
                return Stated(None)
            with tifffile.TiffFile(file) as tif:
                return stated_in(full_page(tif), tif.pages.first.description)
    except Exception as error:  # as in read_field
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def stated_in(page: tifffile.TiffPage, first_text: str = "") -> Stated:
    """What a page states, the first page's text (OME's is there) or its own included."""
    tags = _of_tags(page)
    text = page.description or ""
    kinds = (("OME", _of_ome(first_text, page)), ("ImageJ", _of_imagej(text, page)), ("Aperio's MPP", _of_aperio(text)))
    name, value = next(((name, value) for name, value in kinds if value is not None), ("TIFF tags", tags))
    if value is None:
        return Stated(None)
    if name.startswith("Aperio") and (other := _other_size(text, page)):
        note = f"Aperio's text is of {other} px, the image has {page.imagewidth} x {page.imagelength}: its MPP "
        note += f"{value:g} may be old"
        if not is_plausible(tags) or not contradict(tags, value):
            return Stated(None, note)
        return Stated(tags, f"{note}; the TIFF tags' {tags:.4g} is taken")
    if not is_plausible(value):
        return Stated(None, f"{name}: {value:g} um/px")
    if name != "TIFF tags" and is_plausible(tags) and contradict(tags, value):
        return Stated(value, f"{name}: {value:.4g} um/px, the TIFF tags: {tags:.4g}; {name} is taken")
    return Stated(value)


def choose_resolution(path: Path, stated: Stated, table: float, asked: float, insist: bool) -> Resolution:
    """The um/px to go by: what the dataset's table says, else the file, else what the user asks for.

    table, asked: um/px, NaN where there is none. insist: what is asked for comes first.
    Raises: InputError: none of them knows it.
    """
    known = {"dataset": table, "file": stated.um_per_px, "flag": asked}
    if insist:
        known = {"flag": asked, **known}
    known = {source: float(value) for source, value in known.items() if value is not None and value > 0}
    if not known:
        low, high = UM_PER_PX_RANGE
        found = f" (the file says {stated.note})" if stated.note else ""
        raise InputError(
            f"{path}: states no resolution between {low} and {high} um/px; give it with --um_per_px{found}"
        )
    source, um_per_px = next(iter(known.items()))
    notes = [stated.note] if stated.note else []
    others = [f"{WORDS[name]} {value:.4g}" for name, value in known.items() if contradict(value, um_per_px)]
    if others:
        insisting = " (--insist_um_per_px takes that)" if others[-1].startswith(WORDS["flag"]) else ""
        notes.insert(0, f"{WORDS[source]} {um_per_px:.4g} um/px, which is taken; {' and '.join(others)}{insisting}")
    return Resolution(um_per_px, source, "; ".join(notes))


def contradict(one: float, other: float) -> bool:
    """Whether two resolutions are not the same."""
    return max(one, other) >= min(one, other) * (1 + CONTRADICTS)


def is_plausible(um_per_px: float | None) -> bool:
    """Whether a microscope gives this resolution."""
    low, high = UM_PER_PX_RANGE
    return um_per_px is not None and low <= um_per_px <= high


def _square(x: float | None, y: float | None) -> float | None:
    """The side of a pixel whose two sides agree."""
    if x is None or y is None or not (x > 0 and y > 0):
        return None
    return x if math.isclose(x, y, rel_tol=SQUARE) else None


def _per_unit(page: tifffile.TiffPage) -> tuple[float | None, float | None]:
    """Units per pixel by the tags XResolution and YResolution."""
    pairs = [page.tags.valueof(name, default=(0, 1)) for name in ("XResolution", "YResolution")]
    x, y = (denominator / numerator if numerator and denominator else None for numerator, denominator in pairs)
    return x, y


def _of_tags(page: tifffile.TiffPage) -> float | None:
    unit = TAG_UNITS_UM.get(page.tags.valueof("ResolutionUnit", default=2))
    side = _square(*_per_unit(page))
    return None if unit is None or side is None else side * unit


def _of_aperio(text: str) -> float | None:
    found = re.search(r"\bMPP\s*=\s*([0-9.]+)", text)
    return float(found[1]) if found else None


def _other_size(text: str, page: tifffile.TiffPage) -> str | None:
    """The size that Aperio's text states, where it is not the page's: the text was copied from another image.

    Only its first part counts: behind `|` stand properties, behind `;` the steps before.
    """
    first = re.split(r"[|;]", text)[0]
    sizes = re.findall(r"(\d+)x(\d+)", re.sub(r"\(\d+x\d+\)", "", first)) if first.startswith("Aperio") else []
    if not sizes or (str(page.imagewidth), str(page.imagelength)) in sizes:
        return None
    return " x ".join(sizes[-1])


def _of_imagej(text: str, page: tifffile.TiffPage) -> float | None:
    """ImageJ keeps its unit in the text, and pixels per unit in the tags."""
    if not text.startswith("ImageJ="):
        return None
    unit = re.search(r"^unit=(.+)$", text, re.MULTILINE)
    um = UNITS_UM.get(unit[1].strip().lower()) if unit else None
    side = _square(*_per_unit(page))
    return None if um is None or side is None else um * side


def _of_ome(text: str, page: tifffile.TiffPage) -> float | None:
    """PhysicalSizeX of the image in OME's text that has the page's size."""
    if "<OME" not in text and ":OME" not in text:
        return None
    for pixels in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", text):
        facts = {name: html.unescape(value) for name, value in re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']", pixels)}
        if (facts.get("SizeX"), facts.get("SizeY")) != (str(page.imagewidth), str(page.imagelength)):
            continue
        sides = [_ome_side(facts.get(f"PhysicalSize{axis}"), facts.get(f"PhysicalSize{axis}Unit")) for axis in "XY"]
        return _square(*sides)
    return None


def _ome_side(number: str | None, unit: str | None) -> float | None:
    um = UNITS_UM.get((unit or OME_DEFAULT).lower())
    try:
        return None if um is None or number is None else float(number) * um
    except ValueError:
        return None
