"""What is kept of an image's scan in its folder, so that an interrupted run goes on where it was left."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dasc.detect.slide import Progress
from dasc.errors import InputError
from dasc.files import write_json

COLUMNS = ["x_px", "y_px", "probability"]


def is_finished(path: Path) -> bool:
    """Whether the scan in a file came to its end; `SavedScan` says whether it may be gone on with."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["finished"] is True
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


class SavedScan:
    """The scan of one image in a JSON file: its settings, how far it is, and what was found.

    settings: everything the detections depend on, in plain values; a scan is gone on with only if all are equal.
    resume: read what an earlier run left; False: begin anew.
    Attributes: detections: of a finished scan (x_px, y_px, probability); None while it is not finished. progress: of an
    unfinished one, as `slide.scan_slide` takes it.
    Raises: InputError: a file that was begun with other settings, or is broken.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.settings = path, settings
        self.detections: pd.DataFrame | None = None
        self.progress = Progress()
        if resume and path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            found = [[float(value) for value in row] for row in content["found"]]
            begun, finished = dict(content["settings"]), content["finished"]
            self.progress = Progress(content["survey"], int(content["tiles"]), found)
            detections = pd.DataFrame(found, columns=COLUMNS, dtype=float)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{self.path}: not a scan of this project; leave out --resume to begin anew") from error
        for name, value in self.settings.items():
            if begun.get(name) != value and name == "image_sha256":
                raise InputError(
                    f"{self.path}: is the scan of another image of this name (SHA-256 {str(begun.get(name))[:12]}, not "
                    f"{str(value)[:12]}); leave out --resume to begin anew, or name another --out"
                )
            if begun.get(name) != value:
                raise InputError(
                    f"{self.path}: was begun with {name} {begun.get(name)}, not {value}; leave out --resume"
                )
        if finished:
            self.detections = detections

    def save(self, progress: Progress) -> None:
        """Keep an unfinished scan."""
        self._write(progress.survey, progress.tiles, progress.found, finished=False)

    def finish(self, detections: pd.DataFrame) -> None:
        """Keep the detections of a finished scan."""
        self._write(None, 0, detections[COLUMNS].to_numpy(float).tolist(), finished=True)

    def _write(self, survey: dict | None, tiles: int, found: list[list[float]], finished: bool) -> None:
        content = {"settings": self.settings, "finished": finished, "survey": survey, "tiles": tiles, "found": found}
        write_json(self.path, content)
