"""A scan that is kept on disk comes back as it was, and never with other settings."""

import pandas as pd
import pytest

from dasc.detect.resume import SavedScan
from dasc.detect.slide import Progress
from dasc.errors import InputError

SETTINGS = {"model_sha256": "ab", "um_per_px": 0.2274, "views": 8}
SURVEY = {"stain": [[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]], "padding_density": (0.25, 1.5), "lowest_score": -1.25}


def test_an_unfinished_scan_goes_on(tmp_path):
    found = [[1.0000001, 2.5, 0.123456789012345], [3.0, 4.0, 1e-9]]
    SavedScan(tmp_path / "a/scan.json", SETTINGS, resume=False).save(Progress(dict(SURVEY), 50, found))
    again = SavedScan(tmp_path / "a/scan.json", SETTINGS, resume=True)
    assert again.detections is None
    assert (again.progress.tiles, again.progress.found) == (50, found)
    assert again.progress.survey == SURVEY | {"padding_density": [0.25, 1.5]}


def test_a_finished_scan_is_not_done_again(tmp_path):
    table = pd.DataFrame({"x_px": [1.5], "y_px": [2.0], "probability": [0.75], "mitosis": [True]})
    for detections in (table, table[:0]):
        SavedScan(tmp_path / "scan.json", SETTINGS, resume=False).finish(detections)
        again = SavedScan(tmp_path / "scan.json", SETTINGS, resume=True)
        pd.testing.assert_frame_equal(again.detections, detections[["x_px", "y_px", "probability"]])


def test_without_resume_or_a_file_it_begins_anew(tmp_path):
    SavedScan(tmp_path / "scan.json", SETTINGS, resume=False).save(Progress({}, 7, []))
    assert SavedScan(tmp_path / "scan.json", SETTINGS, resume=False).progress == Progress()
    assert SavedScan(tmp_path / "other.json", SETTINGS, resume=True).progress == Progress()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"found": [[1]], "settings": {}}'])
def test_what_is_no_scan_is_named(tmp_path, text):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(InputError, match=r"scan\.json: not a scan"):
        SavedScan(tmp_path / "scan.json", SETTINGS, resume=True)


def test_other_settings_are_both_shown(tmp_path):
    SavedScan(tmp_path / "scan.json", SETTINGS, resume=False).save(Progress())
    with pytest.raises(InputError, match=r"views 8, not 4"):
        SavedScan(tmp_path / "scan.json", SETTINGS | {"views": 4}, resume=True)
