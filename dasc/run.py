"""One run of a script: its errors, device, seed, arguments, and files that appear whole or not at all."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import torch
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.time()
PACKAGES = (  # whatever reads pixels, computes or draws
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "opencv-python-headless",
    "Pillow",
    "tifffile",
    "imagecodecs",
    "openslide-python",
    "openslide-bin",
    "matplotlib",
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t")  # a spreadsheet runs a cell that begins with one of these
LONGEST_NAME = 200  # characters of a file's name that we make; file systems take 255 bytes


class InputError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class WriteError(InputError):
    """A file that cannot be written: what comes after it cannot be either."""


def run_script(
    main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace, out: Path | None = None
) -> None:
    """Call `main(args)` and leave with its exit status; an InputError becomes one line and status 1.

    `main` returns None or 0 when all went well and 1 when something was skipped. No other run can write to the folder
    `out` (None: args.out) meanwhile.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 is printed spelt out, as on standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with only_run(Path(out or args.out)):
            status = main(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "lower --batch_size, free the device's memory, or take --device cpu"
        print(f"error: the device's memory is full ({reason}); {advice}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def true_or_false(text: str) -> bool:
    """Argparse type for a flag that takes True or False; bool("False") would be True."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def positive(text: str) -> int:
    """Argparse type for a flag that takes a whole number from 1 on."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, found {text!r}")
    return int(text)


def pick_device(name: str) -> torch.device:
    """Turn `--device` (auto, cpu, cuda, mps) into a device; auto takes the first of cuda, mps, cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
        if name == "cpu":
            print("no CUDA or mps device found: running on the CPU")
    elif name not in available:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or mps")
    elif not available[name]:
        raise InputError(f"--device {name}: not available on this machine; --device auto picks what is")
    return torch.device(name)


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


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold the folder `out` for this run: a second run on it raises InputError.

    The lock `.<name>.lock` says which process of which host holds it. It lies beside `out`, which some scripts replace
    as a whole, or within it where the folder above cannot be written. The system frees the lock of a killed run,
    whose file is taken over.
    """
    out = Path(out).resolve()
    made = not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.parent if os.access(out.parent, os.W_OK) else out
        path = folder / f".{out.name}.lock"
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{out}: another run writes here ({_holder(path)}); wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error.strerror or error})") from error
    try:
        with contextlib.suppress(OSError):  # a full disk; Windows lets nobody write to a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # there nobody deletes it either
            path.unlink()
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was written


def _holder(path: Path) -> str:
    """What a lock says of its run."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "a process that this system does not name"


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
    """Make the finished folder `partial` the folder `out`; an older one stays as `<out>.previous`."""
    if hasattr(os, "sync"):  # once, where thousands of small files would each wait for the disk
        os.sync()
    previous = out.with_name(f"{out.name}.previous")
    if out.exists():
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


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain types, so that the file loads with `weights_only=True`; same content, same bytes."""
    buffer = io.BytesIO()  # given a path, torch writes its name into the file, and on a full disk hides why it failed
    torch.save(checkpoint, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def record_run(
    out: Path,
    args: argparse.Namespace,
    *,
    inputs: dict[str | Path, int],
    device: torch.device | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write OUT/run.json: how the results beside it were made; return its content.

    Args:
        inputs: files and folders that were read, and how many rows, patches or images of each; files get their hash.
        device: that computed; None: the CPU.
        facts: counts, skips with their reasons, and whatever else the script has to say.
    """
    device = device or torch.device("cpu")
    if getattr(args, "init_weights", ""):
        inputs = {**inputs, args.init_weights: 1}
    content = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": vars(args),
        "inputs": {
            str(path): {"count": count, "sha256": sha256(path) if Path(path).is_file() else None}
            for path, count in inputs.items()
        },
        "started": _time(STARTED),
        "finished": _time(time.time()),
        "seconds": round(time.time() - STARTED, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(),
        "commit": project_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        **facts,
    }
    content = json.loads(json.dumps(content, default=str))
    write_json(Path(out) / "run.json", content)
    return content


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # opencv-python in place of its headless twin
        return None


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def project_commit() -> str | None:
    """The git commit of these files, with -dirty behind it where one was changed; None outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
            return None
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None
