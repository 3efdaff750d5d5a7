"""One run of a script: its errors, device, seed, arguments, and files that appear whole or not at all."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch


class InputError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class WriteError(InputError):
    """A file that cannot be written: what comes after it cannot be either."""


def run_script(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> None:
    """Call `main(args)` and leave with its exit status; an InputError becomes one line and status 1.

    `main` returns None or 0 when all went well and 1 when something was skipped.
    """
    try:
        status = main(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    A killed run or a full disk leaves the old file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold `out` for this run: a second run in it raises InputError, one that was killed leaves it free.

    OUT/.lock names the process and its host while the block lasts.
    """
    path = Path(out) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _is_stale(path):
            path.unlink()
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise InputError(
            f"{out}: another run writes here ({path.read_text(encoding='utf-8')}); wait for it or choose another "
            f"--out; if it is gone, delete {path}"
        ) from error
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error.strerror or error})") from error
    with file:
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            file.close()  # Windows deletes no open file
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # where nothing was written


def _is_stale(path: Path) -> bool:
    """Whether the process that a lock names runs no more, as far as this host can tell."""
    words = path.read_text(encoding="utf-8").split(maxsplit=3)
    if len(words) < 4 or words[3] != platform.node() or not words[1].isdigit():
        return False
    if os.name == "nt":  # where signal 0 would end the process, but a file held open cannot be deleted
        return True
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(words[1]) == os.getpid()


def check_replaceable(out: Path, mark: str) -> None:
    """Raise InputError where the folder `out` holds files but no `mark`: it is not one that we wrote."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file())):
        raise InputError(f"{out}: holds files but no {mark}; name another --out")


@contextlib.contextmanager
def replacing_folder(out: Path, mark: str) -> Iterator[Path]:
    """Yield a new folder beside `out` that takes its place when the block ends without an error.

    The older one stays as `<out>.previous`. Errors: InputError as `check_replaceable`, or where it cannot be written.
    """
    check_replaceable(out, mark)
    partial, previous = (out.with_name(f"{out.name}.{word}") for word in (f"{os.getpid()}.partial", "previous"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            if previous.exists():
                shutil.rmtree(previous)
            out.rename(previous)
        partial.rename(out)
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` without its index; the same table gives the same bytes on every system."""
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain types, so that the file loads with `weights_only=True`."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def record_run(out: Path, args: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """Write run.json beside the output: command, arguments, versions and whatever the script adds; return it."""
    content = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": vars(args),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        **facts,
    }
    content = json.loads(json.dumps(content, default=str))
    write_json(Path(out) / "run.json", content)
    return content
