"""A reader's answers: one row per key, appended and brought to disk before the next."""

import csv
import io
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from dasc.errors import InputError, WriteError
from dasc.files import writing

COLUMNS = ["time", "reader", "item", "answer", "seconds", "pass", "queue_sha256"]
ANSWERS = {"M": "mitosis", "L": "look-alike", "U": "unsure", "X": "cannot judge"}
READER = re.compile(r"[\w][\w .-]{0,59}")
LONGEST = 1e7  # seconds; a computer may sleep between two keys
HEADER = ",".join(COLUMNS) + "\n"


class Answer(NamedTuple):
    """One key: answer is a key of ANSWERS, or empty where an earlier one is taken back."""

    time: str
    reader: str
    item: int
    answer: str
    seconds: float
    number: int  # of the pass through the queue
    queue_sha256: str


def check_reader(reader: str) -> str:
    """A reader's name or initials, which name a file too; InputError for anything else."""
    if not READER.fullmatch(reader) or reader.endswith((".", " ")):
        raise InputError(
            f"--reader {reader!r}: expected a name or initials of letters, digits, blanks, . _ and -; it names a file"
        )
    return reader


class AnswerFile:
    """The answers of one reader to one queue, in answers/READER.csv. One process at a time writes to it.

    Raises:
        InputError: a file of another queue or reader, or one that cannot be read.
    """

    def __init__(self, path: Path, reader: str, queue_sha256: str, items: int, number: int = 1) -> None:
        self.path, self.reader, self.queue_sha256, self.items, self.number = path, reader, queue_sha256, items, number
        self._lock = threading.Lock()
        self.rows: list[Answer] = []
        if path.is_file():
            self.rows, cut = read_answers(path, queue_sha256, items)
            for row in self.rows:
                if row.reader != reader:
                    raise InputError(f"{path}: answers of {row.reader}, expected {reader}; name another --reader")
            if cut:
                print(f"{path}: its last row was cut off and is gone: {cut!r}")
                self._cut()

    def _cut(self) -> None:
        """Cut the file after its last whole row."""
        with writing(self.path):
            data = self.path.read_bytes()
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    @property
    def last(self) -> dict[int, str]:
        """The last answer of this pass to every item that has one."""
        return last_answers([row for row in self.rows if row.number == self.number])

    @property
    def minutes(self) -> float:
        return sum(row.seconds for row in self.rows if row.number == self.number) / 60

    def append(self, item: int, answer: str | None, seconds: float) -> int:
        """Write one answer, None to take the last one back; how many items are answered now.

        Raises:
            InputError: no such item or answer, or no time that somebody took. WriteError: a full disk.
        """
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < self.items:
            raise InputError(f"item {str(item)[:20]}: expected a number from 0 to {self.items - 1}")
        if answer is not None and (not isinstance(answer, str) or answer not in ANSWERS):
            raise InputError(f"answer {str(answer)[:20]!r}: expected {', '.join(ANSWERS)} or null")
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= LONGEST:
            raise InputError(f"seconds {str(seconds)[:20]}: expected a number from 0 to {LONGEST:g}")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = Answer(time, self.reader, item, answer or "", round(float(seconds), 2), self.number, self.queue_sha256)
        with self._lock:
            try:
                self._append(row)
            except OSError as error:
                raise WriteError(f"{self.path}: cannot be written ({error.strerror or error})") from error
            self.rows.append(row)
            return len(self.last)

    def _append(self, row: Answer) -> None:
        """Bring one row to disk; half a row that a full disk left is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        with self.path.open("ab") as file:
            start = file.tell()
            try:
                file.write(((HEADER if not start else "") + text.getvalue()).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise


def last_answers(rows: list[Answer]) -> dict[int, str]:
    """The last answer to every item, without those that were taken back."""
    last = {row.item: row.answer for row in rows}
    return {item: answer for item, answer in last.items() if answer}


def read_answers(path: Path, queue_sha256: str, items: int) -> tuple[list[Answer], str]:
    """The rows of an answers file, and what stands of a last row that was cut off.

    Raises:
        InputError: a row that is none, or one of another queue.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as answers of review.py ({error})") from error
    whole, _, cut = text.replace("\r\n", "\n").rpartition("\n")
    lines = list(csv.reader(io.StringIO(whole)))
    if (lines[0] if lines else cut.split(",")) != COLUMNS and not (not lines and HEADER.startswith(cut)):
        raise InputError(f"{path}: its columns are not {','.join(COLUMNS)}; expected answers of review.py")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{path}, row {number}"
        try:
            time, reader, item, answer, seconds, taken, sha256 = cells
            row = Answer(time, reader, int(item), answer, float(seconds), int(taken), sha256)
        except ValueError as error:
            raise InputError(f"{where}: {','.join(cells)[:80]!r} is no answer; remove the row") from error
        if row.queue_sha256 != queue_sha256:
            raise InputError(
                f"{where}: an answer to another queue ({row.queue_sha256[:12]}, this queue is {queue_sha256[:12]}); "
                "give the --out folder of its own queue, or name another --reader"
            )
        if not 0 <= row.item < items or (row.answer and row.answer not in ANSWERS) or not 0 <= row.seconds <= LONGEST:
            raise InputError(f"{where}: {','.join(cells)[:80]!r} is no answer to this queue; remove the row")
        rows.append(row)
    return rows, cut
