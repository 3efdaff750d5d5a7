"""One run of a script: its flags, device, exit status, hold on its folder, and the record of how it was made."""

import argparse
import contextlib
import glob
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from dasc.errors import InputError, WriteError
from dasc.files import sha256, write_json
from dasc.flags import Shard

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.time()
DOOR_S = 30.0  # a shard waits so long for others that begin just now
TORCHRUN = ("RANK", "WORLD_SIZE")  # the ranks count from 0
SLURM_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
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
    "shapely",
)


def run_script(
    main: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    out: Path | None = None,
    join: "Callable[[int, int], contextlib.AbstractContextManager] | None" = None,
) -> None:
    """Call `main(args)` and leave with its exit status; an InputError becomes one line and status 1.

    `main` returns None or 0 when all went well and 1 when something was skipped. No other run can write to the folder
    `out` (None: args.out) meanwhile; other shards of this one can. A script with a flag --shard finds there what
    `pick_shard` says. A script that several processes of torchrun run as one has `join`, which is given rank and number
    of processes: rank 0 alone holds the folder and prints.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 is printed spelt out, as on standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if hasattr(args, "shard"):
            args.shard = pick_shard(args.shard)
        rank, size = _ranks() if join else (0, 1)
        with contextlib.ExitStack() as held:
            if size > 1:
                held.enter_context(join(rank, size))
            held.enter_context(_unheard() if rank else only_run(Path(out or args.out), getattr(args, "shard", "")))
            status = main(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if not _is_memory_full(error):
            raise
        reason = str(error).split(". ")[0]
        advice = "lower --batch_size, free the device's memory, or take --device cpu"
        print(f"error: the device's memory is full ({reason}); {advice}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def pick_shard(shard: Shard) -> Shard:
    """The shard of this run: the flag's, else what torchrun and a SLURM array say; says which decided.

    Runs of torchrun within the tasks of an array share what falls to their task. A launcher of one run alone shares
    nothing.
    """
    by = ["--shard"]
    if not shard:
        index, of, by = 0, 1, []
        if task := _variables(SLURM_ARRAY):
            number, of, low, high = task
            if high - low + 1 != of or not low <= number <= high:
                raise InputError(
                    f"SLURM_ARRAY_TASK_ID {number}: one of {of} tasks from {low} to {high}, expected an array without "
                    "gaps, such as --array=0-7; give --shard I/N to run some of its tasks"
                )
            index, by = number - low, ["SLURM_ARRAY_TASK_ID"]
        rank, size = _ranks("; or give --shard I/N")
        if size > 1:
            index, of, by = index * size + rank, of * size, [*by, "RANK"]
        if of == 1:
            return shard
        shard = Shard(f"{index + 1}/{of}")
    print(f"shard {shard}, by {' and '.join(by)}")
    return shard


def _ranks(advice: str = "") -> tuple[int, int]:
    """The rank of this process and their number, by torchrun; 0 and 1 without it. advice: what else may be done."""
    rank, size = _variables(TORCHRUN, advice) or (0, 1)
    if rank >= size:
        raise InputError(f"RANK {rank}: expected 0 to {size - 1} by WORLD_SIZE {size}{advice}")
    return rank, size


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Within the block nothing is printed: what rank 0 prints too."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _variables(names: tuple[str, ...], advice: str = "; or give --shard I/N") -> list[int]:
    """The whole numbers in variables of the environment that are set together; empty where none is set."""
    found = {name: os.environ.get(name, "") for name in names}
    for name, text in found.items():
        if any(found.values()) and not re.fullmatch("[0-9]{1,9}", text):
            others = " and ".join(other for other in names if other != name and found[other])
            what = f"{text!r}, expected a whole number" if text else f"not set, although {others} is"
            raise InputError(f"{name}: {what}; set all of {', '.join(names)} or none{advice}")
    return [int(text) for text in found.values() if text]


def pick_device(name: str, one_of_several: bool | str = False) -> "torch.device":
    """Turn `--device` (auto, cpu, cuda, mps) into a device; auto takes the first of cuda, mps, cpu that is there.

    Of several CUDA devices a shard, or one of several processes, takes the one that torchrun names in LOCAL_RANK.
    """
    import torch  # here: scripts that use no network start in a fraction of the time

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
        if name == "cpu":
            print("no CUDA or mps device found: running on the CPU")
    elif name not in available:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or mps")
    elif not available[name]:
        raise InputError(f"--device {name}: not available on this machine; --device auto picks what is")
    local = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and one_of_several and local:
        count = torch.cuda.device_count()
        if not re.fullmatch("[0-9]{1,9}", local) or int(local) >= count:
            raise InputError(f"LOCAL_RANK {local}: {count} CUDA devices are seen here; start at most one run for each")
        name = f"cuda:{int(local)}"
    return torch.device(name)


@contextlib.contextmanager
def only_run(out: Path, shard: str = "") -> Iterator[None]:
    """Hold the folder `out` for this run: a second run on it raises InputError.

    The lock `.<name>.lock` says which process of which host holds it. It lies beside `out`, which some scripts replace
    as a whole, or within it where the folder above cannot be written. The system frees the lock of a killed run,
    whose file is taken over. A shard holds `.<name>.2_of_3.lock`, and the other lock only while it takes its own.
    """
    out = Path(out).resolve()
    made = not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error.strerror or error})") from error
    folder = out.parent if os.access(out.parent, os.W_OK) else out
    try:
        with contextlib.ExitStack() as held:
            with contextlib.ExitStack() as door:
                door.enter_context(_locked(folder / f".{out.name}.lock", out, DOOR_S if shard else 0))
                if shard:
                    held.enter_context(_locked(folder / f".{out.name}.{shard.replace('/', '_of_')}.lock", out))
                else:
                    for path in folder.glob(f".{glob.escape(out.name)}.[0-9]*_of_[0-9]*.lock"):
                        with _locked(path, out):  # that of a killed shard goes
                            pass
                    held.enter_context(door.pop_all())
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was written


@contextlib.contextmanager
def _locked(path: Path, out: Path, timeout: float = 0) -> Iterator[None]:
    """Hold the lock `path` of the folder `out`; raises InputError where another process does for `timeout` s."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{out}: another run writes here ({_holder(path)}); wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error.strerror or error})") from error
    try:
        with contextlib.suppress(OSError):  # a full disk; Windows lets nobody write to a locked file
            path.write_text(this_process(), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # there nobody deletes it either
            path.unlink()
        lock.release()


def this_process() -> str:
    """Which process of which host this is."""
    return f"process {os.getpid()} on {platform.node()}"


def _holder(path: Path) -> str:
    """What a lock says of its run."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "a process that this system does not name"


def record_run(
    out: Path,
    args: argparse.Namespace,
    *,
    inputs: dict[str | Path, int],
    device: "torch.device | None" = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write OUT/run.json: how the results beside it were made; return its content.

    Args:
        inputs: files and folders that were read, and how many rows, patches or images of each; files get their hash.
        device: that computed; None: the CPU.
        facts: counts, skips with their reasons, and whatever else the script has to say.
    """
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
        "device": _device_name(device),
        "processes": _ranks()[1],
        "system": platform.platform(),
        "commit": project_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        **facts,
    }
    content = json.loads(json.dumps(content, default=str))
    write_json(Path(out) / "run.json", content)
    return content


def _is_memory_full(error: RuntimeError) -> bool:
    """Whether a device had no memory left; without torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _device_name(device: "torch.device | None") -> str:
    if device is None:
        return "cpu"
    return sys.modules["torch"].cuda.get_device_name(device) if device.type == "cuda" else device.type


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
