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
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        raise InputError(f"{out}: cannot be written ({error})") from error
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


def record_run(out: Path, args: argparse.Namespace, **facts: Any) -> None:
    """Write run.json beside the output: command, arguments, versions and whatever the script adds."""
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
    write_json(Path(out) / "run.json", json.loads(json.dumps(content, default=str)))
