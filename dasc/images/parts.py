"""Which files one slide is made of, and the hash of its content: some formats spread a slide over many files."""

import hashlib
import re
from pathlib import Path

from dasc.errors import InputError
from dasc.files import sha256

DICOM_MARK = b"DICM"  # behind 128 bytes that say nothing
DICOM_HEADER_BYTES = 1 << 18  # in which the series of an instance is looked for
LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
SERIES = b"\x20\x00\x0e\x00"  # the element SeriesInstanceUID (0020,000E)
UNKNOWN = 0xFFFFFFFF  # length of a sequence that says itself where it ends
ITEM, ITEM_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0"


def content_sha256(path: Path) -> str:
    """SHA-256 of a slide's content: of its file, or of the hashes and names of all its files.

    Every byte is read: about a second per GB, of a scan that takes minutes.
    Raises: InputError: a file that cannot be read.
    """
    try:
        parts = parts_of(path)
        if len(parts) == 1:
            return sha256(path)
        lines = [f"{sha256(part)}  {part.relative_to(path.parent).as_posix()}\n" for part in sorted(parts)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def content_bytes(path: Path) -> int:
    """Size of a slide's files together; 0 where they cannot be read."""
    try:
        return sum(part.stat().st_size for part in parts_of(path))
    except OSError:
        return 0


def parts_of(path: Path) -> list[Path]:
    """The files of a slide, the one at `path` first: MRXS has a folder, VMS and VMU name theirs, DICOM is a series."""
    others: list[Path] = []
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        others = [file for file in sorted(path.with_suffix("").rglob("*")) if file.is_file()]
    elif suffix in (".vms", ".vmu"):
        named = re.findall(r"=\s*(\S.*?)\s*$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        others = [file for name in dict.fromkeys(named) if (file := path.with_name(Path(name).name or "-")).is_file()]
    elif series := dicom_series(path):
        others = [file for file in sorted(path.parent.iterdir()) if file != path and dicom_series(file) == series]
    return [path, *others]


def dicom_series(path: Path) -> str | None:
    """SeriesInstanceUID of a DICOM file, in which all instances of one slide agree; None where it has none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(132)
        if not start.endswith(DICOM_MARK) or len(start) < 132:
            return None
        data = file.read(DICOM_HEADER_BYTES)
    place = 0
    try:
        while place + 12 <= len(data) and data[place : place + 4] != SERIES:
            place = _after_element(data, place)
    except RecursionError:  # sequences within sequences without end
        return None
    if data[place : place + 4] != SERIES:
        return None
    size = int.from_bytes(data[place + 6 : place + 8], "little")
    return data[place + 8 : place + 8 + size].rstrip(b"\0 ").decode("ascii", "replace") or None


def _after_element(data: bytes, place: int) -> int:
    """Where the element after the one at `place` begins: explicit kinds, little-endian, as all DICOM slides have."""
    long = data[place + 4 : place + 6] in LONG_KINDS
    size = int.from_bytes(data[place + 8 : place + 12] if long else data[place + 6 : place + 8], "little")
    place += 12 if long else 8
    return place + size if size != UNKNOWN else _after_sequence(data, place)


def _after_sequence(data: bytes, place: int) -> int:
    """Where a sequence of unknown length ends, whose first item begins at `place`."""
    while place + 8 <= len(data) and data[place : place + 4] == ITEM:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if size != UNKNOWN:
            place += size
            continue
        while place + 8 <= len(data) and data[place : place + 4] != ITEM_END:
            place = _after_element(data, place)
        place += 8
    return place + 8  # behind its own end mark
