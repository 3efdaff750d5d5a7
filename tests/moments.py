"""A script in a child process that SIGKILL ends at one moment of its run; the child keeps a list of its moments.

A moment is the nth time that something happens: a training step, a field or tile looked at, a patch cut, a file
written. While a file is written the child kills itself with part of it on the disk; at any other moment a process
beside it does so after a delay, wherever the child then is. Children are forked from a server that has imported
everything and computed nothing, so that they start at once and no thread is lost in the fork (POSIX only).
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from pipeline import ROOT, last_of_each

import dasc.data.patches
import dasc.detect.image
import dasc.detect.slide
import dasc.detect.val
import dasc.files
import dasc.model.loop

PLACES = [  # where the scripts find a function, and what happens there
    (torch.optim.Adam, "step", "step"),
    (dasc.detect.val, "look_at", "field"),
    (dasc.detect.image, "scan_field", "field"),
    (dasc.detect.slide, "log_odds", "batch of tiles"),
    (dasc.data.patches, "write_patch", "patch"),
    (dasc.files, "put_in_place", "putting the folder in place"),
]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.glob("dasc/**/[a-z]*.py"))]
LIMIT_S = 300


class Moment(NamedTuple):
    """The number-th time that `what` happens; part: seconds after it, or the share of a file that is on the disk."""

    what: str
    number: int
    part: float

    def __str__(self) -> str:
        if self.what.startswith("writing "):
            return f"{self.what} ({self.number}), {self.part:.0%} of it on the disk"
        return f"{self.what} {self.number}, {1000 * self.part:.0f} ms later"


class Run(NamedTuple):
    """How a child ended: exit status (-9: killed), what happened in it, what it printed."""

    status: int
    happened: list[str]
    said: str


@contextlib.contextmanager
def watching(happens: Callable[[str, Callable[[float], None]], None]) -> Iterator[None]:
    """Call happens(what, write) whenever something of PLACES happens or a file is about to be written.

    write(share): write the first part of the file and no more; does nothing elsewhere.
    """

    def told(what: str, whole: Callable) -> Callable:
        def call(*args, **options):
            happens(what, lambda share: None)
            return whole(*args, **options)

        return call

    def told_file(whole: Callable) -> Callable:
        def call(path: Path, data, *args, **options):
            def write(share: float) -> None:
                whole(path, data[: round(share * len(data))], *args, **options)

            if path.name.endswith(".tmp"):
                happens(f"writing {path.name[1:-4]}", write)
            return whole(path, data, *args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, what in PLACES:
            stack.enter_context(mock.patch.object(owner, name, told(what, getattr(owner, name))))
        for name in ("write_text", "write_bytes"):
            stack.enter_context(mock.patch.object(Path, name, told_file(getattr(Path, name))))
        yield


def kill_after(seconds: float) -> None:
    """Have another process kill this one."""
    me = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == me:  # else it has ended, and its number may be another's
            os.kill(me, signal.SIGKILL)
        os._exit(0)


def child(script: str, flags: list[str], log: str, moment: Moment | None, prepare: Callable[[], None] | None) -> None:
    """Run the script here; stop at the moment. What happens is kept line by line in LOG.moments."""
    printed = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    moments = os.open(f"{log}.moments", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    counts: dict[str, int] = {}
    one_at_a_time = threading.Lock()

    def happens(what: str, write: Callable[[float], None]) -> None:
        with one_at_a_time:
            counts[what] = counts.get(what, 0) + 1
            os.write(moments, f"{what}\n".encode())
            if moment and (what, counts[what]) == moment[:2]:
                if what.startswith("writing "):
                    write(moment.part)
                    os.kill(os.getpid(), signal.SIGKILL)
                kill_after(moment.part)

    if prepare:
        prepare()
    sys.argv = [str(ROOT / script), *last_of_each(flags)]
    with watching(happens):
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_child(
    log: Path, script: str, *flags: object, moment: Moment | None = None, prepare: Callable[[], None] | None = None
) -> Run:
    """Run a script of the project in a child process and in this process's folder, until its end or the moment.

    prepare: a function of a module, called in the child before the script.
    """
    return end_child(start_child(log, script, *flags, moment=moment, prepare=prepare), log)


def start_child(
    log: Path, script: str, *flags: object, moment: Moment | None = None, prepare: Callable[[], None] | None = None
) -> multiprocessing.Process:
    """As `run_child`, without waiting: several may run at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "moments", *MODULES])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # older Pythons do not tell the server
        forkserver.ensure_running()
    process = context.Process(target=child, args=(script, [*map(str, flags)], str(log), moment, prepare))
    process.start()
    return process


def end_child(process: multiprocessing.Process, log: Path) -> Run:
    """Wait for the end of a child that keeps this log."""
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{log}: not at its end after {LIMIT_S} s\n{log.read_text()}")
    happened = Path(f"{log}.moments").read_text().splitlines()
    return Run(process.exitcode, happened, log.read_text(errors="replace"))
