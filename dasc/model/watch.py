"""Watches over the processes of one training: one that dies, hangs or fails is named, and the others end as well.

Every process has a thread that counts up in the store of torch.distributed and reads the counts of the others. The
store lies with rank 0, or with the torchrun that started it.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from dasc.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_S = 2.0  # between two signs of life
SILENT_S = 30.0  # a process without a sign of life for so long counts as dead, and the store without an answer
BROKEN_S = 4 * BEAT_S  # the same where an exchange has broken off
BEHIND_S = 40.0  # a process that others wait for so long counts as hanging; beyond what a slow disk takes
LINGER_S = 4.0  # a process that fails stays so long, for the others to read how; rank 0 twice so long, with the store
LEFT = 1 << 40  # added to the signs of life of a process that has ended well
AHEAD = 1 << 40  # added to the exchanges of a process that the others may wait for
FAILED = "failed"  # key of what the first process that failed says


class Signs:
    """What a process has seen of all: signs of life and exchanges begun, each with the time of its last change."""

    def __init__(self, rank: int, size: int, now: float) -> None:
        self.rank = rank
        self.beats, self.exchanges = [(0, now)] * size, [(0, now)] * size

    def see(self, rank: int, beats: int, exchanges: int, now: float) -> None:
        """Take in the counts of one process."""
        for seen, count in ((self.beats, beats), (self.exchanges, exchanges)):
            if seen[rank][0] != count:
                seen[rank] = count, now

    def fault(self, now: float, silent_s: float) -> str:
        """What is wrong with the first process of which something is; empty: with none.

        silent_s: a process without a sign of life for so long counts as dead.
        """
        done, since = self.exchanges[self.rank]
        done %= AHEAD
        for rank, ((beats, last), (begun, moved)) in enumerate(zip(self.beats, self.exchanges, strict=True)):
            if beats >= LEFT:
                continue
            if now - last > silent_s:
                return f"rank {rank} has died or hangs: no sign of life for {now - last:.0f} s"
            if 0 < begun < done and now - max(moved, since) > BEHIND_S:
                return f"rank {rank} hangs: the others have waited for it for {now - max(moved, since):.0f} s"
        return ""


class Watch:
    """The watch of one process; `close` ends it.

    store: for this watch alone. A store whose connection waits for something answers nothing else.
    """

    def __init__(self, rank: int, size: int, store: "Store") -> None:
        self.rank, self.size, self.store = rank, size, store
        self.linger_s = LINGER_S if rank else 2 * LINGER_S
        self.exchanges = 0  # begun by this process
        self.closed = threading.Event()
        self.broken = self.failing = False  # whether an exchange has broken off; whether this process says its fault
        self.answered = time.monotonic()  # when the store last did
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._await_store)]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Tell the others that this process needs no watch any more."""
        self.closed.set()
        for thread in self.threads:
            thread.join(SILENT_S)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """What needs all processes. An error of it waits for the watch to find the process that is to blame."""
        self.exchanges += 1
        try:
            yield
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # gloo's error names no rank
                self.broken = True
                time.sleep(BROKEN_S + 3 * BEAT_S + 2 * LINGER_S)
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What this process does while the others may wait for it for as long as it takes."""
        self.exchanges += AHEAD
        try:
            yield
        finally:
            self.exchanges -= AHEAD

    def fail(self, rank: str, text: str) -> bool:
        """Tell the others how this process failed; False where another has told the same.

        rank: what goes before the text where it holds of this process alone.
        """
        first, told, self.failing = True, text, True
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = self.store.add(f"{FAILED} in all", 1) == 1
            told = self.store.compare_set(FAILED, "", rank + text).decode()
        time.sleep(self.linger_s)
        return first or not told.endswith(text)

    def _beat(self) -> None:
        """Give signs of life, look for those of the others, and end this process where one is missing."""
        signs, told = Signs(self.rank, self.size, time.monotonic()), 0
        try:
            while not self.closed.wait(BEAT_S):
                begun = self.exchanges
                self.store.add(f"beats {self.rank}", 1)
                self.store.add(f"exchanges {self.rank}", begun - told)
                told = begun
                for rank in range(self.size):
                    counts = [self.store.add(f"{kind} {rank}", 0) for kind in ("beats", "exchanges")]
                    signs.see(rank, *counts, time.monotonic())
                self.answered = time.monotonic()
                if self.store.check([FAILED]):
                    said = self.store.get(FAILED).decode()
                    if not (self.closed.wait(self.linger_s) or self.failing):  # else it ends by itself
                        self._end(said)
                elif fault := signs.fault(self.answered, BROKEN_S if self.broken else SILENT_S):
                    self._end(self.store.compare_set(FAILED, "", fault).decode(), self.linger_s)
            self.store.add(f"beats {self.rank}", LEFT)
        except RuntimeError:  # the connection is lost
            if not self.closed.is_set():
                self._end("rank 0, or the torchrun that started it, has ended")

    def _await_store(self) -> None:
        """End this process where the store does not answer; the other thread then waits for it."""
        while not self.closed.wait(BEAT_S):
            if time.monotonic() - self.answered > SILENT_S + BEAT_S:
                self._end("rank 0, or the torchrun that started it, has died or hangs: no answer from it")

    def _end(self, said: str, linger: float = 0.0) -> NoReturn:
        """End this process at once: its main thread waits for others, and no exception reaches it."""
        print(f"\nerror: {said}; this process, rank {self.rank}, ends too", file=sys.__stderr__, flush=True)
        time.sleep(linger)
        os._exit(1)


class UnlikeError(InputError):
    """What every process finds and says alike."""


def check_alike(facts: list[dict[str, object]]) -> None:
    """Raise UnlikeError where a process differs from rank 0, and say in what.

    facts: of every rank: its flags and what else must be alike, by name; `<flag>_sha256`: the file of that flag.
    """
    for rank, own in enumerate(facts):
        found = [
            f"--{name.removesuffix('_sha256')} is another file"
            if name.endswith("_sha256")
            else f"{name} {own.get(name)}, not {facts[0].get(name)}"
            for name in sorted({**facts[0], **own})
            if own.get(name) != facts[0].get(name)
        ]
        if found:
            raise UnlikeError(
                f"rank {rank} is not like rank 0: {'; '.join(found)}; all processes of a training need the same files "
                "and flags"
            )
