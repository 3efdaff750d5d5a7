"""Read annotations of any program known here: what a file is, its content says; which image it is of, its name."""

import gzip
import json
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from dasc.data.qupath import is_annotation, read_geojson, read_measurements
from dasc.data.shapes import Shape, Source
from dasc.data.viewers import is_coco, read_asap, read_coco, read_imagescope, read_sliderunner
from dasc.errors import InputError
from dasc.images.find import IMAGE_SUFFIXES, SLIDE_SUFFIXES

FORMATS = ("auto", "geojson", "tsv", "asap", "imagescope", "coco", "sliderunner")
SUFFIXES = (
    ".geojson",
    ".json",
    ".tsv",
    ".txt",
    ".csv",
    ".xml",
    ".sqlite",
    ".db",
    ".gz",
    ".zip",
)  # looked for in folders
OURS = ("detections",)  # our own files lie in a folder of the image's name
MOST_BYTES = 1 << 30  # of a file, unpacked: millions of objects


def find_annotations(paths: list[Path]) -> list[Path]:
    """The files among `paths` and the annotation files in the folders among them, sorted.

    Raises: InputError: a path that is missing, a folder without any.
    """
    found = []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = [one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()]
            files = [one for one in files if not any(part.startswith(".") for part in one.relative_to(path).parts)]
            if not files:
                raise InputError(f"{path}: no annotations in this folder; expected files {', '.join(SUFFIXES)}")
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder of annotations")
        found += files
    return sorted(set(found))


def read_annotations(path: Path, kind: str = "auto") -> list[Source]:
    """What a file says of every image it is of. kind: one of FORMATS.

    Raises: InputError naming file and place for whatever cannot be read or is of another format.
    """
    data = _unpacked(path)
    try:
        found, content = _parse(path, data)
        if kind not in ("auto", found):
            raise InputError(f"{path}: --format {kind}, but its content is {found}; leave --format at auto")
        if found == "geojson":
            return read_geojson(path, content)
        if found == "coco":
            return read_coco(path, content, kind == "coco")
        if found == "tsv":
            return read_measurements(path, content)
        if found == "sliderunner":
            return read_sliderunner(path)
        return (read_asap if found == "asap" else read_imagescope)(path, content)
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply") from error


def _unpacked(path: Path) -> bytes:
    """The bytes of a file, or of the one file in a .gz or .zip."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: more than {MOST_BYTES >> 20} MB; export fewer objects, without measurements")
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(path) as file:
                data = file.read(MOST_BYTES + 1)
        elif data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
                if len(names) != 1:
                    raise InputError(f"{path}: holds {len(names)} files; expected one; unpack it first")
                with archive.open(names[0]) as file:
                    data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy or export it again") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"{path}: unpacks to more than {MOST_BYTES >> 20} MB; export fewer objects")
    return data


def _parse(path: Path, data: bytes) -> tuple[str, Any]:
    """The format of a file, and its content as the format's reader takes it."""
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    if data.startswith(b"SQLite format 3\0"):
        return "sliderunner", None
    if start.startswith(b"<"):
        try:
            root = ElementTree.fromstring(data)
        except (ElementTree.ParseError, DefusedXmlException, ValueError, LookupError) as error:
            raise InputError(f"{path}: cannot be read as XML ({type(error).__name__}: {error})") from error
        kinds = {"ASAP_Annotations": "asap", "Annotations": "imagescope"}
        if root.tag not in kinds:
            raise InputError(f"{path}: XML of {str(root.tag)[:60]!r}; expected that of ASAP or of Aperio ImageScope")
        return kinds[root.tag], root
    if start.startswith((b"{", b"[")):
        try:
            content = json.loads(data.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{path}: cannot be read as JSON ({error})") from error
        return ("coco" if is_coco(content) else "geojson"), content
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")  # tables that a spreadsheet saved
    if "centroid" not in text.split("\n", 1)[0].lower():
        raise InputError(
            f"{path}: no annotations known here; expected GeoJSON or a measurement table of QuPath, XML of ASAP or "
            "ImageScope, COCO, or a database of SlideRunner"
        )
    return "tsv", text


def name_of(path: Path) -> str:
    """The name that an annotation file gives its image: a.svs.geojson.gz is of a.svs, a.geojson of any a.

    Our own detections.geojson lies in a folder of the image's name.
    """
    name = path.name
    while Path(name).suffix.lower() in SUFFIXES:
        name = Path(name).stem
    return unquote(path.parent.name) if name in OURS else name


def match_image(said: str, images: list[Path]) -> list[Path]:
    """The images of this name, or else those that have it but for the suffixes of images."""
    return [image for image in images if image.name == said] or [
        image for image in images if stem(image.name) == stem(said)
    ]


def stem(name: str) -> str:
    """The name of an image without the suffix of its kind; a.1 stays what it is."""
    return Path(name).stem if Path(name).suffix.lower() in (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES) else name


def image_of(source: Source, path: Path, images: list[Path], folder: str) -> Path:
    """The one image that a source is of. Raises: InputError: none, or several; says what was looked for and where."""
    said = source.image or name_of(path)
    found = match_image(said, images)
    if len(found) != 1:
        several = f" ({', '.join(str(one) for one in found[:3])})" if found else ""
        raise InputError(
            f"{path}: {'several images are' if found else 'no image is'} called {said} in {folder}{several}; "
            f"expected one: {said}, or {stem(said)} with a suffix of images"
        )
    return found[0]


def check_classes(shapes: list[Shape], named: list[str]) -> None:
    """Raise InputError where a class is named nowhere; it lists all with their counts."""
    counts = Counter(shape.name for shape in shapes)
    known = {key(name) for name in named}
    if any(key(name) not in known for name in counts):
        listed = ", ".join(f"{name!r}: {count}" for name, count in sorted(counts.items()))
        unknown = ", ".join(repr(name) for name in sorted(counts) if key(name) not in known)
        raise InputError(
            f"class {unknown} is named nowhere; found {listed}; name every class: --mitosis NAME..., --look_alike "
            "NAME..., --region NAME..., --ignore NAME..."
        )


def key(name: str) -> str:
    """A class's name as it is compared: capitals and spaces round it do not count."""
    return name.strip().casefold()


def read_areas(path: Path) -> list[Source]:
    """As `read_annotations` of QuPath's GeoJSON, without its detections and cells."""
    data = _unpacked(path)
    found, content = _parse(path, data)
    if found != "geojson":
        raise InputError(f"{path}: its content is {found}; expected GeoJSON of QuPath")
    features = content.get("features") if isinstance(content, dict) and "features" in content else content
    features = features if isinstance(features, list) else [features]
    return read_geojson(path, [one for one in features if not isinstance(one, dict) or is_annotation(one)])
