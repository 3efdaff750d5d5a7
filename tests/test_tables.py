"""What passes between stages: tables are checked and joined by patch, cut.json says how patches were cut."""

import json

import pandas as pd
import pytest

from dasc.data.cut import Cut, read_cut, write_cut
from dasc.data.tables import HARD, MEMORY, SCL, join_by_patch, levels_of, read_hard, read_memory, read_scl, write_table
from dasc.errors import InputError


def write(path, rows, columns):
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


GOOD = ["a.png", 1, "annotated", 5, 3, 2, 6, 4, 0.5, 0.5, 0.5, 0.5, 0.1]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("label", 2, "label 2"),
        ("clean", -1, "clean is -1"),
        ("noise_score", "", "noise_score is nan"),
        ("centroid_distance", "inf", "centroid_distance is 'inf'"),
        ("hard", "many", "hard is 'many'"),
    ],
)
def test_bad_cell_is_named_with_its_row(tmp_path, column, value, says):
    bad = ["b.png", *GOOD[1:]]
    bad[list(MEMORY).index(column)] = value
    with pytest.raises(InputError, match=says):
        read_memory(write(tmp_path / "memory.csv", [GOOD, bad], MEMORY))


def test_single_epoch_is_said(tmp_path):
    uncounted = ["b.png", 1, "annotated", 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.1]
    path = write(tmp_path / "memory.csv", [GOOD, uncounted], MEMORY)
    with pytest.raises(InputError, match=r"1 of 2 patches have no counted epoch.*COUNT_AFTER_SHARE"):
        read_memory(path)


def test_patch_twice(tmp_path):
    with pytest.raises(InputError, match="twice"):
        read_memory(write(tmp_path / "memory.csv", [GOOD, GOOD], MEMORY))


def hard_table(*rows):
    """Rows of verdict, level and hardness."""
    return [[f"{number}.png", 1, *row, 0.1, 0.1, 0.1] for number, row in enumerate(rows)]


SOUND = [("hard", 0, 1 / 3), ("hard", 2, 1), ("clean", "", 0), ("noisy", "", ""), ("dropped", "", "")]


def test_levels_are_told_by_the_hard_patches(tmp_path):
    table = read_hard(write(tmp_path / "hard.csv", hard_table(*SOUND), HARD))
    assert levels_of(table, table["verdict"] == "hard") == 3
    assert levels_of(table[2:], table["verdict"][2:] == "hard") == 0
    table = read_hard(write(tmp_path / "hard.csv", hard_table(("hard", 0, 0.25)), HARD))  # none of the harder ones
    assert levels_of(table, table["verdict"] == "hard") == 4


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (("hrad", "", ""), "verdict 'hrad'"),
        (("hard", "", 0.5), "level nan"),
        (("hard", 3, 1), "row 7: level 3|row 2: level 0"),
        (("hard", 0.5, 0.5), "level 0.5"),
        (("hard", 1, 0.9), "hardness 0.9"),
        (("hard", 1, 0), "hardness 0"),
        (("hard", 1, ""), "hardness nan"),
        (("clean", 1, 0), "level 1"),
        (("clean", "", 0.5), "hardness 0.5"),
        (("noisy", "", 1), "hardness 1"),
    ],
)
def test_verdict_level_and_hardness_must_agree(tmp_path, row, says):
    path = write(tmp_path / "hard.csv", hard_table(*SOUND, row), HARD)
    with pytest.raises(InputError, match=says):
        read_hard(path)


@pytest.mark.parametrize(
    ("rows", "sound"),
    [
        ([(0, 1 / 3), (2, 1), (3, 0)], True),
        ([(3, 0), (3, 0)], True),  # no hard patch stays
        ([(0, 1 / 3), (2, 1), (2, 0)], False),  # a clean one at a level of hard ones
        ([(0, 1 / 3), (2, 0.5)], False),
    ],
)
def test_level_and_hardness_of_scl_csv_must_agree(tmp_path, rows, sound):
    path = write(tmp_path / "SCL.csv", [[f"{number}.png", 1, *row] for number, row in enumerate(rows)], SCL)
    if sound:
        assert len(read_scl(path)) == len(rows)
    else:
        with pytest.raises(InputError, match=r"run clus_hard\.py"):
            read_scl(path)


def test_tables_are_written_by_the_columns_they_are_read_by(tmp_path):
    table = pd.DataFrame(hard_table(*SOUND), columns=list(HARD)).assign(more=1)
    write_table(tmp_path / "hard.csv", table[list(table)[::-1]], HARD)
    assert list(read_hard(tmp_path / "hard.csv")) == list(HARD)


def test_cut_json_says_how_patches_were_cut(tmp_path):
    cut = Cut(80, 0.25, True, "/data/set")
    write_cut(tmp_path, cut)
    assert read_cut(tmp_path) == cut
    write_cut(tmp_path, Cut(224, None, False, None, 512))
    assert read_cut(tmp_path).um_per_px is None and read_cut(tmp_path).source_px == 512


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 0},
        {"patch_size": "80"},
        {"um_per_px": -1},
        {"um_per_px": True},
        {"normalise_stain": 1},
        {"data_root": 3},
        {"source_px": 1.5},
        {"more": 1},
    ],
)
def test_a_wrong_cut_json_is_refused(tmp_path, change):
    write_cut(tmp_path, Cut(80, 0.25, True, "data"))
    content = json.loads((tmp_path / "cut.json").read_text())
    (tmp_path / "cut.json").write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=r"does not say how the patches were cut; run pre/cut_patch_2\.py"):
        read_cut(tmp_path)


def test_no_cut_json(tmp_path):
    with pytest.raises(InputError, match="does not say how the patches were cut"):
        read_cut(tmp_path)


def test_join_keeps_the_order_of_the_first_and_never_goes_by_row():
    left = pd.DataFrame({"patch": ["a", "b", "c"], "label": [0, 1, 0]})
    right = pd.DataFrame({"patch": ["c", "a", "b"], "label": [0, 0, 1], "level": [2, 0, 1]})
    joined = join_by_patch(left, right, "l.csv", "r.csv")
    assert joined.to_dict("list") == {"patch": ["a", "b", "c"], "label": [0, 1, 0], "level": [0, 1, 2]}


def test_join_refuses_tables_of_different_runs():
    left = pd.DataFrame({"patch": ["a", "b"], "label": [0, 1]})
    with pytest.raises(InputError, match=r"r.csv: lacks 1 of the 2 patches of l.csv.*first: b"):
        join_by_patch(left, left[:1], "l.csv", "r.csv")
    with pytest.raises(InputError, match=r"l.csv: lacks 1 of the 2 patches of r.csv.*first: b"):
        join_by_patch(left[:1], left, "l.csv", "r.csv")
    with pytest.raises(InputError, match=r"r.csv: patch b has label 0, l.csv has 1"):
        join_by_patch(left, left.assign(label=0), "l.csv", "r.csv")


def test_join_of_empty_tables():
    empty = pd.DataFrame({"patch": [], "label": []})
    assert join_by_patch(empty, empty.assign(level=[]), "l.csv", "r.csv").columns.tolist() == [
        "patch",
        "label",
        "level",
    ]
