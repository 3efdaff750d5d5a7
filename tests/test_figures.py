"""The pictures are read back: their size, and the colours where something must have been drawn."""

import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from dasc.data.tables import LABELS
from dasc.errors import InputError
from dasc.judge.calibration import UNCALIBRATED, Calibration
from dasc.judge.metrics import choose_threshold
from dasc.report.plots import (
    DETECTION,
    DPI,
    FALSE,
    GAP_PX,
    MARGIN_PX,
    MISSED,
    TILE_PX,
    TITLE_PX,
    TRUE,
    contact_sheet,
    curves,
    detector_curves,
    difficulty_plane,
    embedding,
    overlay,
    precision_recall,
    reliability,
    write_png,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
RADIUS_PX = 50  # 12.5 um at 0.25 um/px


def read(path):
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def table(rows):
    return pd.DataFrame(rows, columns=["x_px", "y_px", "probability", "mitosis"])


def circle_color(image, x, y, radius=RADIUS_PX):
    """The colour of the circle's left, bottom and lower left points, which no text touches."""
    diagonal = round(radius / 2**0.5)
    places = [(x - radius, y), (x, y + radius), (x - diagonal, y + diagonal)]
    colors = {tuple(image[row, column].tolist()) for column, row in places}
    return colors.pop() if len(colors) == 1 else colors


def test_true_false_and_missed_have_their_colours():
    field = np.full((900, 1000, 3), 200, np.uint8)
    rows = [(202, 200, 0.9, True), (500, 200, 0.8, True), (200, 500, 0.2, False)]
    truth = np.array([[200.0, 200], [200, 500], [800, 600]])
    drawn = overlay(field, table(rows), 0.25, truth)
    assert drawn.shape == field.shape and drawn.dtype == np.uint8
    assert (field == 200).all()
    assert circle_color(drawn, 202, 200) == TRUE
    assert circle_color(drawn, 500, 200) == FALSE
    assert circle_color(drawn, 200, 500) == MISSED
    assert circle_color(drawn, 800, 600) == MISSED
    for x, y in ((202, 200), (500, 200), (200, 500), (800, 600)):
        assert (drawn[y - 30 : y + 30, x - 30 : x + 30] == 200).all()


def test_the_overlay_matches_as_the_evaluation_does():
    """At 0.25 um/px 30 px is in, at 0.5 it is out; a second detection of one mitosis is false unless uts."""
    field = np.full((800, 800, 3), 200, np.uint8)
    rows = table([(300, 330, 0.9, True), (300, 325, 0.9, True)])
    truth = np.array([[300.0, 300]])
    assert circle_color(overlay(field, rows[:1], 0.25, truth), 300, 330) == TRUE
    assert circle_color(overlay(field, rows[:1], 0.5, truth), 300, 330, 25) == FALSE
    assert circle_color(overlay(field, rows, 0.25, truth), 300, 330) == FALSE
    unknown = overlay(field, rows[:1], None, truth, match="uts")
    assert circle_color(unknown, 300, 330) == TRUE
    with pytest.raises(InputError, match="um_per_px"):
        overlay(field, rows, None, truth)


def test_without_annotations_every_mitosis_has_its_probability():
    field = np.full((800, 800, 3), 200, np.uint8)
    rows = table([(300, 300, 0.9, True), (600, 600, 0.1, False)])
    drawn = overlay(field, rows, None)
    assert circle_color(drawn, 300, 300) == DETECTION
    assert (drawn[500:700, 500:700] == 200).all()
    beside = (slice(230, 258), slice(350, 400))
    other = overlay(field, table([(300, 300, 0.44, True)]), None)
    assert (drawn[beside] != 200).any()
    assert (drawn[beside] != other[beside]).any()


def test_the_legend_keeps_clear_of_the_detections_and_the_field_of_the_edge():
    """A detection in three corners leaves the fourth to the legend; texts at the edge stay inside."""
    field = np.full((600, 700, 3), 200, np.uint8)
    corners = [(10, 10), (690, 10), (10, 590), (690, 590)]
    for free in range(4):
        rows = [(*place, 0.9, True) for index, place in enumerate(corners) if index != free]
        drawn = overlay(field, table(rows), 0.25)
        x, y = (0 if value < limit / 2 else limit - 1 for value, limit in zip(corners[free], (700, 600), strict=True))
        assert (drawn[y, x] < 100).all()  # the box, beside its text, whose shape differs between releases of OpenCV


@pytest.mark.parametrize("shape", [(20, 30, 3), (128, 128, 3), (3000, 300, 3)])
def test_fields_of_any_size_and_without_detections(shape):
    field = np.full(shape, 200, np.uint8)
    assert overlay(field, table([]), 0.25, np.empty((0, 2))).shape == shape
    assert overlay(field, table([(-5, 5000, 1.0, True)]), None).shape == shape


def test_lines_grow_with_the_field():
    rows = table([(200, 200, 0.9, True)])
    widths = [
        (overlay(np.full((size, size, 3), 200, np.uint8), rows, 0.25)[200, 130:170] == DETECTION).all(1).sum()
        for size in (500, 3000)
    ]
    assert widths[1] >= 2 * widths[0] > 0


def test_png_keeps_every_pixel_under_any_name(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    path = tmp_path / "new" / "$x_1$ \u00e9.png"
    write_png(path, image)
    assert (read(path) == image).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="folder"):
        write_png(tmp_path / "folder.png", image)


def test_contact_sheet_shows_every_patch_in_its_place(tmp_path):
    colors = np.random.default_rng(0).integers(0, 200, (9, 3), dtype=np.uint8)
    patches = np.broadcast_to(colors[:, None, None], (9, 80, 80, 3))
    large = np.full((1, 128, 128, 3), 77, np.uint8)
    path = tmp_path / "sheet.png"
    contact_sheet(path, [("first", patches, None), ("second", large, ["one"])], columns=4, per_group=6)
    sheet = read(path)
    step, half = TILE_PX + GAP_PX, TILE_PX // 2
    assert sheet.shape[1] == 2 * MARGIN_PX + 4 * step - GAP_PX
    for index in range(6):
        row, column = divmod(index, 4)
        y, x = MARGIN_PX + TITLE_PX + row * step + half, MARGIN_PX + column * step + half
        tile = sheet[y - half : y + half, x - half : x + half]
        assert (tile == colors[index]).all()
    after_last = MARGIN_PX + TITLE_PX + step, MARGIN_PX + 2 * step
    assert (sheet[after_last[0] : after_last[0] + TILE_PX, after_last[1] :] == 255).all()
    below = MARGIN_PX + 2 * TITLE_PX + 2 * step
    assert (sheet[below : below + TILE_PX, MARGIN_PX : MARGIN_PX + TILE_PX] == 77).all()
    assert (sheet[MARGIN_PX : MARGIN_PX + TITLE_PX, :200] < 100).any()
    caption = sheet[below + TILE_PX : below + TILE_PX + 18, MARGIN_PX : MARGIN_PX + TILE_PX]
    assert (caption < 100).any()


def test_contact_sheet_of_nothing_and_of_an_odd_width(tmp_path):
    contact_sheet(tmp_path / "none.png", [])
    contact_sheet(tmp_path / "empty.png", [("no patch", np.empty((0, 80, 80, 3), np.uint8), None)])
    assert read(tmp_path / "none.png").shape[0] < read(tmp_path / "empty.png").shape[0]
    for columns in range(1, 14):
        contact_sheet(tmp_path / "odd.png", [], columns=columns)
        width = 2 * MARGIN_PX + columns * (TILE_PX + GAP_PX) - GAP_PX
        assert read(tmp_path / "odd.png").shape[1] == width
    assert DPI & (DPI - 1) == 0


def test_names_are_never_formulae(tmp_path):
    """Broken mathtext raises, and working mathtext would make two names look alike."""
    patch = np.zeros((1, 80, 80, 3), np.uint8)
    pictures = []
    for name in (r"$\broken{$", "$x$", "x", "\udcff"):
        contact_sheet(tmp_path / "sheet.png", [(name, patch, [name])])
        log = pd.DataFrame({"epoch": [1, 2], name: [0.5, 0.1]})
        curves(tmp_path / "curves.png", log, {name: [name]})
        pictures.append(((tmp_path / "sheet.png").read_bytes(), (tmp_path / "curves.png").read_bytes()))
    assert len({sheet for sheet, _ in pictures}) == len({curve for _, curve in pictures}) == 4
    plain = read(tmp_path / "sheet.png")
    assert plain.shape[0] > TILE_PX


def test_curves_show_what_the_log_holds(tmp_path):
    log = pd.DataFrame({"epoch": [1, 2, 3], "loss": [1.0, 0.5, np.nan], "f1": [0.1, 0.2, 0.3]})
    curves(tmp_path / "one.png", log, {"Loss": ["loss"]})
    curves(tmp_path / "two.png", log, {"Loss": ["loss"], "F1": ["f1"]})
    curves(tmp_path / "worse.png", log.assign(loss=[0.5, 1.0, 2.0]), {"Loss": ["loss"]})
    one, two, worse = (read(tmp_path / f"{name}.png") for name in ("one", "two", "worse"))
    assert two.shape[1] == 2 * one.shape[1] and two.shape[0] == one.shape[0]
    assert (one != worse).any()
    curves(tmp_path / "empty.png", log[:0], {"Loss": ["loss"]})
    assert read(tmp_path / "empty.png").shape == one.shape
    with pytest.raises(KeyError, match="accuracy"):
        curves(tmp_path / "not.png", log, {"Accuracy": ["accuracy"]})
    assert not (tmp_path / "not.png").exists()


def test_precision_recall_marks_the_threshold(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 100, (30, 2))
    threshold, curve = choose_threshold([(truth, truth + 1, np.linspace(0.2, 0.9, 30))], 5)
    precision_recall(tmp_path / "at.png", curve, threshold)
    precision_recall(tmp_path / "above.png", curve, 0.99)
    precision_recall(tmp_path / "none.png", curve[:0], 0.5)
    at, above, _ = (read(tmp_path / f"{name}.png") for name in ("at", "above", "none"))
    dark = [(picture.max(axis=2) < 30).sum() for picture in (at, above)]
    assert dark[0] > dark[1]


def test_a_detectors_curves_are_those_two(tmp_path):
    log = pd.DataFrame({"epoch": [0, 1], "loss": [0.9, 0.4]})
    curve = pd.DataFrame({"threshold": [0.2, 0.5], "precision": [0.5, 0.8], "recall": [0.9, 0.4], "f1": [0.64, 0.53]})
    detector_curves(tmp_path / "out", log, {"Loss": ["loss"]}, curve, 0.5)
    curves(tmp_path / "curves.png", log, {"Loss": ["loss"]})
    precision_recall(tmp_path / "val_curve.png", curve, 0.5)
    for name in ("curves.png", "val_curve.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of matplotlib's first and second line


def where(picture, colour, tolerance=3):
    """Rows and columns (N, 2) of the pixels of a colour."""
    return np.argwhere((np.abs(picture.astype(int) - colour) <= tolerance).all(axis=2))


def test_reliability_has_its_points_where_they_belong(tmp_path):
    """100 detections of 0.75, 30 of them right: a point at 0.75, 0.3, and once calibrated further left."""
    probabilities, right = np.full(100, 0.75), np.arange(100) < 30
    calibration = Calibration(offset=-1.9)
    reliability(tmp_path / "a.png", probabilities, right, calibration)
    picture = read(tmp_path / "a.png")
    assert picture.shape == (450, 450, 3)
    dark = picture.max(axis=2) < 100
    left, rightmost = np.flatnonzero(dark.sum(axis=0) > 300)[[0, -1]]  # the frame of the axes
    top, bottom = np.flatnonzero(dark.sum(axis=1) > 300)[[0, -1]]
    for colour, x in ((BLUE, 0.75), (ORANGE, calibration.calibrate(np.array([0.75]))[0])):
        places = where(picture, colour)
        row, column = places[places[:, 0] > (top + bottom) / 2].mean(axis=0)  # below the legend
        assert (column - left) / (rightmost - left) == pytest.approx(x, abs=0.01)
        assert (bottom - row) / (bottom - top) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("number", [0, 4])
def test_reliability_of_too_few_detections_has_no_point(tmp_path, number):
    for count in (number, 100):
        reliability(tmp_path / f"{count}.png", np.full(count, 0.75), np.arange(count) < 30, UNCALIBRATED)
    few, many = (read(tmp_path / f"{count}.png") for count in (number, 100))
    assert few.shape == many.shape and 0 < len(where(few, ORANGE)) < len(where(many, ORANGE)) - 15


def groups_of(**members):
    """Groups of hard.csv, empty but for 300 patches about a place (forget rate, centroid distance) of each member."""
    names = ["clean", *(f"hard, level {level}" for level in range(3)), "noisy", "dropped"]
    empty = pd.DataFrame({"forget_rate": [], "centroid_distance": []}, dtype=float)
    groups = {(label, name): empty for label in LABELS for name in names}
    rng = np.random.default_rng(0)
    for key, place in members.items():
        label, name = key.split(" ", 1)
        places = rng.uniform(-0.1, 0.1, (300, 2)) + place
        groups[int(label), name] = pd.DataFrame(places, columns=["forget_rate", "centroid_distance"])
    return groups


def test_the_difficulty_plane_has_each_label_and_level_in_its_place(tmp_path):
    members = {"0 clean": (0.2, 5.0), "1 hard, level 0": (0.2, 3.0), "1 hard, level 2": (0.8, 5.0)}
    difficulty_plane(tmp_path / "plane.png", groups_of(**members), 3)
    difficulty_plane(tmp_path / "none.png", groups_of(), 3)
    plane, none = read(tmp_path / "plane.png"), read(tmp_path / "none.png")
    assert plane.shape == none.shape == (550, 1200, 3)
    colours = {"clean": (116, 169, 207), "easy": (255, 217, 0), "hardest": (255, 0, 0)}
    places = {name: where(plane, colour, 12) for name, colour in colours.items()}  # where points lie upon each other
    assert all(len(found) > 50 for found in places.values())
    row, column = zip(*(np.median(found, axis=0) for found in places.values()), strict=True)
    assert column[0] < 600 < column[1] < column[2] and row[2] < row[1]
    assert all(len(where(none, colour, 12)) < 30 for colour in colours.values())


def test_an_embedding_has_a_panel_per_grouping(tmp_path):
    rng = np.random.default_rng(0)
    features = np.concatenate([middle + rng.normal(0, 0.02, (60, 8)) for middle in np.eye(8)[:3]])
    kind = np.repeat(["a", "b", "$c$"], 60)
    embedding(tmp_path / "two.png", features, {"subclass": pd.Series(kind, range(5, 185)), "level": ["x"] * 180})
    embedding(tmp_path / "one.png", 7 * features, {"subclass": list(kind)})
    two, one = read(tmp_path / "two.png"), read(tmp_path / "one.png")
    assert two.shape == (550, 1500, 3) and one.shape == (550, 750, 3)
    # A cluster is a heap of its group's colour; of one group, all three heaps have the first colour.
    heaps = [[len(where(part, colour, 30)) for colour in (BLUE, ORANGE)] for part in (two[:, :750], two[:, 750:], one)]
    assert min(heaps[0]) > 50 and heaps[1][0] > 1.5 * heaps[0][0] and heaps[1][1] == 0 and min(heaps[2]) > 50, heaps


def test_same_input_same_bytes_and_no_figure_is_left_open(tmp_path):
    log = pd.DataFrame({"epoch": [1, 2], "loss": [0.5, 0.1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a", "b"):
            curves(tmp_path / f"{name}.png", log, {"Loss": ["loss"]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.skipif(not (SHARED / "data/mitos14").is_dir(), reason="needs the real fields")
def test_overlay_of_a_real_field():
    folder = SHARED / "data/mitos14/H03"
    field = cv2.cvtColor(cv2.imread(str(folder / "frames/x40/H03_00Aa.jpg")), cv2.COLOR_BGR2RGB)
    truth = np.loadtxt(folder / "mitosis/H03_00Aa_mitosis.csv", delimiter=",", ndmin=2)[:, :2]
    x, y = truth[0].astype(int)
    drawn = overlay(field, table([(x, y, 0.8, True)]), 0.2274, truth)
    assert circle_color(drawn, x, y, 55) == TRUE
    assert (drawn[y - 35 : y + 35, x - 35 : x + 35] == field[y - 35 : y + 35, x - 35 : x + 35]).all()
    changed = (drawn != field).any(axis=2).mean()
    assert 0.001 < changed < 0.05
