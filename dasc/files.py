"""Files that appear whole or not at all, and what stands in them: texts, tables, checkpoints."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from dasc.errors import InputError, WriteError

FORMULA_STARTS = ("=", "+", "-", "@", "\t")  # a spreadsheet runs a cell that begins with one of these
PIECE_BYTES = 1 << 20  # of a large file read at a time
LONGEST_NAME = 200  # characters of a file's name that we make; file systems take 255 bytes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses within the block (a full disk, a read-only folder) into a WriteError for `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    A killed run or a full disk leaves the old file as it was. What a killed run left of the temporary file the next
    one writes over: no two runs share a folder (`only_run`).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk; Windows does so itself."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_replaceable(out: Path, mark: str) -> None:
    """Raise InputError where the folder `out` holds files but no `mark`: it is not one that we wrote."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file())):
        raise InputError(f"{out}: holds files but no {mark}; name another --out")


@contextlib.contextmanager
def replacing_folder(out: Path, mark: str) -> Iterator[Path]:
    """Yield a new folder beside `out` that takes its place when the block ends without an error.

    The older one stays as `<out>.previous`; what a killed run left is begun anew. Errors: InputError as
    `check_replaceable`, or where it cannot be written.
    """
    check_replaceable(out, mark)
    partial = out.with_name(f".{out.name}.tmp")
    try:
        with writing(out):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
            put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Make the finished folder `partial` the folder `out`; an older one that is not empty stays as `<out>.previous`."""
    if hasattr(os, "sync"):  # once, where thousands of small files would each wait for the disk
        os.sync()
    previous = out.with_name(f"{out.name}.previous")
    if out.exists() and not any(out.iterdir()):  # made for this run, by Snakemake for one
        out.rmdir()
    elif out.exists():
        if previous.exists():
            shutil.rmtree(previous)
        out.rename(previous)
    partial.rename(out)
    _sync_folder(out.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    write_text(path, spelt_out(json.dumps(content, indent=1, ensure_ascii=False)) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` without its index, texts as `cell`; the same table gives the same bytes on every system."""
    table = table.copy()
    for name in table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]:
        cells = [cell(value) if isinstance(value, str) else value for value in table[name]]
        table[name] = pd.Series(cells, table.index, dtype=object)
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def cell(text: str) -> str:
    """A text as it stands in our CSVs: no spreadsheet runs it, every row is one line's end, every byte is UTF-8.

    A formula gets a single quote before it, as does what looks like a quoted one, so that `from_cell` is its inverse.
    """
    text = spelt_out(text).replace("\r", "\\r")  # the writer does not quote it, and readers end the row there
    return "'" + text if text.lstrip("'").startswith(FORMULA_STARTS) else text


def from_cell(text: str) -> str:
    """The text that `cell` wrote, so that names of cases and images are the same in every stage."""
    if text.startswith("'") and text.lstrip("'").startswith(FORMULA_STARTS):
        text = text[1:]
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)


def spelt_out(text: str) -> str:
    """The text with those bytes of a file's name that are not UTF-8 spelt out, which is how JSON escapes them too."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_name(text: str, safe: str = "") -> str:
    """A name for a file or folder that is made of a text from outside: one part of a path, on every system.

    Other texts have other names. safe: characters that stay beside letters, digits and `_.-~`.
    """
    name = quote(text.encode("utf-8", "surrogatepass"), safe=safe)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return name if name.strip(".") else name.replace(".", "%2E")


def sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(PIECE_BYTES):  # hashlib.file_digest needs Python 3.11
            digest.update(piece)
    return digest.hexdigest()
