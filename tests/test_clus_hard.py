"""Stages 5, 6 and 7 on a small set of drawn patches: tables, shuffled rows, and input that is wrong."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from pipeline import LIGHT, fails, succeed

from dasc.data.cut import Cut, write_cut
from dasc.data.tables import CHECKED, HARD, PATCHES, SCL

HERE = "clus_hard.py"
PER_LABEL = {"clean": 8, "easy": 8, "middle": 8, "hardest": 6, "noisy": 3, "dropped": 2}
BRIGHTNESS = {"clean": 250, "easy": 220, "middle": 130, "hardest": 40, "noisy": 128, "dropped": 128}
LEVEL = {"easy": 0, "middle": 1, "hardest": 2}
EPOCHS = ["--epochs", 3, "--seen_after_share", 0.34]


def kind_of(patch):
    return patch.split("/")[-1].split("_")[0]


def counts(kind, number):
    """Of 20 epochs: clean, hard, noisy, learned, forgotten."""
    forgotten = {"clean": 0, "easy": 2, "middle": 8, "hardest": 15, "noisy": 18, "dropped": 20}[kind]
    states = {"clean": (20, 0, 0), "noisy": (1, 4, 15), "dropped": (0, 20, 0)}.get(kind, (8, 11, 1))
    forgotten += number % 2 * (kind in LEVEL)
    return *states, 20 - forgotten, forgotten


def draw(folder):
    """patches/ with PNGs whose brightness tells their kind, and memory.csv about the training patches."""
    rng = np.random.default_rng(0)
    patches, memory = [], []
    for label in (0, 1):
        kinds = [(kind, number) for kind, count in PER_LABEL.items() for number in range(count)]
        for kind, number in [*kinds, ("clean", 99)]:
            name = f"{label}/{kind}_{number}.png"
            split = "val" if number == 99 else "train"
            picture = np.clip(rng.normal(BRIGHTNESS[kind], 10, (32, 32, 3)), 0, 255).astype(np.uint8)
            (folder / f"patches/{label}").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / "patches" / name), picture)
            row = dict.fromkeys(PATCHES, "") | {"patch": name, "label": label, "split": split}
            patches.append(row | {"x_px": 1, "y_px": 1})
            if split == "train":
                distance = 0.4 + 0.1 * list(PER_LABEL).index(kind) + rng.normal(0, 0.005)
                memory.append([name, label, "", *counts(kind, number), 0.5, 0.5, 0.5, distance, rng.random()])
    write_cut(folder / "patches", Cut(32, 0.25, False, None))
    columns = "patch label origin clean hard noisy learned forgotten confidence_weak confidence_strong confidence_fused"
    columns = [*columns.split(), "centroid_distance", "noise_score"]
    pd.DataFrame(patches).to_csv(folder / "patches/patches.csv", index=False)
    pd.DataFrame(memory, columns=columns).to_csv(folder / "memory.csv", index=False)


def sort_flags(folder, out):
    return ["--memory", folder / "memory.csv", "--manifest", folder / "patches/patches.csv", "--out", out]


def learn_flags(folder, out):
    tables = ["--manifest", folder / "patches/patches.csv", "--hard", folder / "sorted/hard.csv", "--out", out]
    return [*LIGHT, "--batch_size", 8, *EPOCHS, *tables]


def keep_flags(folder, out):
    tables = [("memory", "memory.csv"), ("hard", "sorted/hard.csv"), ("checked", "learned/checked.csv")]
    return [*(part for flag, name in tables for part in (f"--{flag}", folder / name)), "--out", out]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Stages 5 and 6, finished, in one folder, not to be changed."""
    folder = tmp_path_factory.mktemp("difficulty")
    draw(folder)
    succeed(HERE, *sort_flags(folder, folder / "sorted"))
    succeed("DMU/hard_main.py", *learn_flags(folder, folder / "learned"))
    return folder


@pytest.fixture
def copied(tmp_path):
    """Patches and memory that a test may change."""
    draw(tmp_path)
    return tmp_path


def change(path, function):
    function(pd.read_csv(path)).to_csv(path, index=False)


def test_hard_csv(done):
    table = pd.read_csv(done / "sorted/hard.csv")
    assert list(table) == list(HARD)
    memory = pd.read_csv(done / "memory.csv")
    assert table["patch"].tolist() == memory["patch"].tolist()
    assert table["noise_score"].tolist() == memory["noise_score"].tolist()
    kinds = table["patch"].map(kind_of)
    assert table["verdict"].tolist() == ["hard" if kind in LEVEL else kind for kind in kinds]
    assert table["level"].fillna(-1).tolist() == [LEVEL.get(kind, -1) for kind in kinds]
    grades = {"clean": 0, "easy": 1 / 3, "middle": 2 / 3, "hardest": 1}
    assert table["hardness"].fillna(-1).tolist() == [grades.get(kind, -1) for kind in kinds]
    assert (table.loc[kinds == "dropped", "forget_rate"] == 1).all()
    run = json.loads((done / "sorted/clus_hard/run.json").read_text())
    assert run["patches"]["mitosis hard, level 2"] == PER_LABEL["hardest"] and run["quantiles"] == {}


def red(folder):
    """Pixels of difficulty.png in the colour of the hardest level; some are in the legend."""
    blue, green, red = np.moveaxis(cv2.imread(str(folder / "difficulty.png")).astype(int), 2, 0)
    return ((red > 200) & (green < 130) & (blue < 130)).sum()


def test_pictures(done):
    plane, sheet = (cv2.imread(str(done / f"sorted/{name}.png")) for name in ("difficulty", "contact_sheet"))
    assert plane.shape == (550, 1200, 3)
    assert sheet.shape[1] > 1200 and sheet.shape[0] > 12 * 112


def test_shuffled_memory_gives_the_same_rows(done, copied):
    change(copied / "memory.csv", lambda table: table.sample(frac=1, random_state=3))
    succeed(HERE, *sort_flags(copied, copied / "sorted"))
    one, other = (pd.read_csv(folder / "sorted/hard.csv").sort_values("patch") for folder in (done, copied))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True), check_exact=True)


def test_the_paper_flags_at_the_first_sign(done, tmp_path):
    said = succeed(HERE, *sort_flags(done, tmp_path), "--noisy_share", 0).out
    table = pd.read_csv(tmp_path / "hard.csv")
    assert set(table["verdict"]) == {"clean", "noisy", "dropped"}  # every hard patch here was noisy once
    assert "mitosis: no hard patch" in said and table["level"].isna().all()
    assert red(done / "sorted") > 1.5 * red(tmp_path) > 0


def test_trusted_mitoses_reach_stage_8(done, tmp_path):
    succeed(HERE, *sort_flags(done, tmp_path / "sorted"), "--trust_mitoses", "True")
    table = pd.read_csv(tmp_path / "sorted/hard.csv")
    doubted, mitosis = table["patch"].map(kind_of).isin(["noisy", "dropped"]), table["label"] == 1
    assert (table.loc[doubted & mitosis, "verdict"] == "hard").all()
    assert table.loc[doubted & ~mitosis, "verdict"].tolist() == ["noisy"] * 3 + ["dropped"] * 2
    assert (table["verdict"] == "hard").equals(table["level"].notna())
    flags = ["--memory", done / "memory.csv", "--hard", tmp_path / "sorted/hard.csv", "--out", tmp_path]
    checked = table.loc[table["verdict"] == "hard", ["patch", "label", "level"]].assign(seen=2, correct=2)
    checked.astype({"level": int}).to_csv(tmp_path / "checked.csv", index=False)
    succeed("clus_scl.py", *flags, "--checked", tmp_path / "checked.csv")
    stay = pd.read_csv(tmp_path / "SCL.csv")
    assert stay.loc[stay["label"] == 1, "patch"].tolist() == table.loc[mitosis, "patch"].tolist()


def test_too_few_hard_patches_fall_back_and_say_so(copied):
    few = "0/easy_0.png", "0/easy_1.png"
    change(
        copied / "memory.csv",
        lambda table: table[~(table["patch"].map(kind_of).isin(LEVEL)) | table["patch"].isin(few)],
    )
    said = succeed(HERE, *sort_flags(copied, copied / "sorted"), "--manifest", "").out
    assert "negative: levels of the 2 hard patches by quantiles: fewer patches than 3 components" in said
    assert "mitosis: no hard patch" in said
    assert not (copied / "sorted/contact_sheet.png").exists() and (copied / "sorted/difficulty.png").is_file()


def test_memory_of_no_patch_is_a_legal_table(copied):
    change(copied / "memory.csv", lambda table: table[:0])
    succeed(HERE, *sort_flags(copied, copied / "sorted"), "--manifest", "")
    assert len(pd.read_csv(copied / "sorted/hard.csv")) == 0


SORT_FAULTS = {
    "missing": (lambda path: path.unlink(), "python DMU/main.py"),
    "uncounted": (lambda path: change(path, lambda t: t.assign(learned=0, forgotten=0)), "COUNT_AFTER_SHARE"),
    "column": (lambda path: change(path, lambda t: t.drop(columns="noise_score")), "noise_score"),
    "less": (lambda path: change(path, lambda t: t[1:]), "lacks 1 of the 70 patches"),
    "label": (lambda path: change(path, lambda t: t.assign(label=1 - t["label"])), "different runs"),
}


@pytest.mark.parametrize("name", SORT_FAULTS)
def test_bad_memory_is_one_line_and_writes_nothing(copied, name):
    spoil, says = SORT_FAULTS[name]
    spoil(copied / "memory.csv")
    fails(HERE, *sort_flags(copied, copied / "sorted"), says=says)
    assert not (copied / "sorted").exists()


def test_patch_gone_writes_nothing(copied):
    (copied / "patches/1/noisy_0.png").unlink()
    fails(HERE, *sort_flags(copied, copied / "sorted"), says="noisy_0.png")
    assert not (copied / "sorted").exists()


def test_checked_csv(done):
    table = pd.read_csv(done / "learned/checked.csv")
    assert list(table) == list(CHECKED)
    assert table["level"].tolist() == [LEVEL[kind_of(patch)] for patch in table["patch"]]
    assert len(table) == 2 * sum(PER_LABEL[kind] for kind in LEVEL)
    assert (table["seen"] == 2).all() and table["correct"].between(0, 2).all()
    log = pd.read_csv(done / "learned/log.csv")
    assert log["label"].tolist() == ["negative"] * 3 + ["mitosis"] * 3 and log["epoch"].tolist() == [0, 1, 2] * 2
    assert log["correct"].notna().tolist() == [False, True, True] * 2
    right = log.loc[(log["label"] == "mitosis"), "correct"].sum()
    assert right * 22 == pytest.approx(table.loc[table["label"] == 1, "correct"].sum(), abs=1e-3)
    curves = cv2.imread(str(done / "learned/curves.png"))
    assert curves.shape[1] > 2 * curves.shape[0] and curves.std() > 5 and (done / "learned/run.json").is_file()


def test_it_learns_levels_that_show(done, tmp_path):
    """Brightness tells the level, so nearly all are told right."""
    flags = [*learn_flags(done, tmp_path), "--epochs", 25, "--seen_after_share", 0.84]
    flags += ["--stain", 0, "--light", 0, "--focus", 0]
    succeed("DMU/hard_main.py", *flags)
    checked = pd.read_csv(tmp_path / "checked.csv")
    assert (checked["correct"] / checked["seen"] >= 0.5).mean() > 0.9


def test_resume_refuses_another_run(done, copied):
    out = copied / "learned"
    out.mkdir()
    (out / "last.pt").write_bytes((done / "learned/last.pt").read_bytes())
    fails("DMU/hard_main.py", *learn_flags(done, out), "--resume", "--lr", 0.5, says="--lr")
    (copied / "sorted").mkdir()
    (copied / "sorted/hard.csv").write_bytes((done / "sorted/hard.csv").read_bytes())
    change(copied / "sorted/hard.csv", lambda table: table.assign(noise_score=0))
    fails("DMU/hard_main.py", *learn_flags(copied, out), "--resume", says="another table than --hard")
    (out / "last.pt").write_bytes(b"nonsense")
    fails("DMU/hard_main.py", *learn_flags(done, out), "--resume", says="not a readable checkpoint")
    (out / "last.pt").unlink()
    fails("DMU/hard_main.py", *learn_flags(done, out), "--resume", says="leave out --resume")


@pytest.fixture
def resorted(done, copied):
    """A copy of patches, memory and all tables that a test may change."""
    for name in ("sorted/hard.csv", "learned/checked.csv"):
        (copied / name).parent.mkdir()
        (copied / name).write_bytes((done / name).read_bytes())
    return copied


def test_shuffled_tables_give_the_same_bytes(done, resorted):
    for name in ("sorted/hard.csv", "learned/checked.csv"):
        change(resorted / name, lambda table: table.sample(frac=1, random_state=1).astype({"label": int}))
    succeed("DMU/hard_main.py", *learn_flags(resorted, resorted / "again"))
    assert (resorted / "again/checked.csv").read_bytes() == (done / "learned/checked.csv").read_bytes()
    for folder in (done, resorted):
        succeed("clus_scl.py", *keep_flags(folder, resorted / folder.name), "--keep_share", 0)
    one, other = (resorted / folder.name / "SCL.csv" for folder in (done, resorted))
    assert one.read_bytes() == other.read_bytes()


def test_no_hard_patch_is_an_empty_table(resorted):
    change(resorted / "sorted/hard.csv", lambda table: table[~table["patch"].map(kind_of).isin(LEVEL)])
    change(resorted / "patches/patches.csv", lambda table: table[~table["patch"].map(kind_of).isin(LEVEL)])
    change(resorted / "memory.csv", lambda table: table[~table["patch"].map(kind_of).isin(LEVEL)])
    said = succeed("DMU/hard_main.py", *learn_flags(resorted, resorted / "learned"), "--resume").out
    assert "negative: no hard patch" in said and "mitosis: no hard patch" in said
    table = pd.read_csv(resorted / "learned/checked.csv")
    assert len(table) == 0 and list(table) == list(CHECKED)
    succeed("clus_scl.py", *keep_flags(resorted, resorted / "kept"))
    table = pd.read_csv(resorted / "kept/SCL.csv")
    assert set(table["level"]) == {0} and set(table["hardness"]) == {0}  # clean is the level above the hardest: none


def test_one_level_is_kept_and_said(resorted):
    def one_level(table):
        easy = table["patch"].map(kind_of).isin(LEVEL) & (table["label"] == 1)
        return table.assign(level=table["level"].where(~easy, 1), hardness=table["hardness"].where(~easy, 2 / 3))

    change(resorted / "sorted/hard.csv", one_level)
    said = succeed("DMU/hard_main.py", *learn_flags(resorted, resorted / "learned")).out
    assert "mitosis: 22 hard patches of one level" in said and "negative: 22" not in said
    table = pd.read_csv(resorted / "learned/checked.csv")
    assert (table.loc[table["label"] == 1, "seen"] == 0).all()
    assert (table.loc[table["label"] == 0, "seen"] == 2).all()
    said = succeed("clus_scl.py", *keep_flags(resorted, resorted / "kept"))
    balance = pd.read_csv(resorted / "kept/balance.csv").set_index("label")
    assert balance.loc["mitosis", "level_1"] == 22 and balance.loc["mitosis", "failed_validation"] == 0


@pytest.mark.parametrize(("epochs", "seen"), [(1, 1), (2, 2), (7, 6)])
def test_any_number_of_epochs_counts(done, tmp_path, epochs, seen):
    """With SEEN_AFTER_SHARE as it is: 0.14 of 70 epochs are the paper's 10."""
    tables = ["--manifest", done / "patches/patches.csv", "--hard", done / "sorted/hard.csv", "--out", tmp_path]
    succeed("DMU/hard_main.py", *LIGHT, *tables, "--epochs", epochs)
    assert (pd.read_csv(tmp_path / "checked.csv")["seen"] == seen).all()


LEARN_FAULTS = {
    "missing": ("sorted/hard.csv", lambda path: path.unlink(), "python clus_hard.py"),
    "level": ("sorted/hard.csv", lambda path: change(path, lambda t: t.assign(level=t["level"] * 2)), "hardness"),
    "less": ("sorted/hard.csv", lambda path: change(path, lambda t: t[:-1]), "lacks 1 of the 70"),
    "more": ("patches/patches.csv", lambda path: change(path, lambda t: t[1:]), "lacks 1 of the 70"),
    "manifest": ("patches/patches.csv", lambda path: path.unlink(), "pre/cut_patch_2.py"),
    "gone": ("patches/1/easy_0.png", lambda path: path.unlink(), "easy_0.png"),
}


@pytest.mark.parametrize("name", LEARN_FAULTS)
def test_bad_input_of_stage_6(resorted, name):
    path, spoil, says = LEARN_FAULTS[name]
    spoil(resorted / path)
    fails("DMU/hard_main.py", *learn_flags(resorted, resorted / "new"), says=says)
    assert not (resorted / "new/checked.csv").exists()


def test_stage_6_loss_that_is_not_finite(done, tmp_path):
    wild = ["--lr", 1e30, "--nan_steps", 2]
    fails("DMU/hard_main.py", *learn_flags(done, tmp_path), *wild, says="lower --lr")


def test_scl_csv_and_balance(resorted):
    """Two easy mitoses and one hardest negative fail; 5 of 10 is enough."""
    failing = {"1/easy_0.png": 4, "1/easy_3.png": 0, "0/hardest_1.png": 4}
    change(
        resorted / "learned/checked.csv",
        lambda table: table.assign(seen=10, correct=[failing.get(patch, 5) for patch in table["patch"]]),
    )
    done = succeed("clus_scl.py", *keep_flags(resorted, resorted / "kept"))
    table = pd.read_csv(resorted / "kept/SCL.csv")
    assert list(table) == list(SCL)
    memory = pd.read_csv(resorted / "memory.csv")
    stays = memory[memory["patch"].map(kind_of).isin([*LEVEL, "clean"]) & ~memory["patch"].isin(list(failing))]
    assert table["patch"].tolist() == stays["patch"].tolist() and table["label"].tolist() == stays["label"].tolist()
    assert table["level"].tolist() == [LEVEL.get(kind_of(patch), 3) for patch in stays["patch"]]
    assert table["hardness"].tolist() == [(LEVEL.get(kind_of(patch), -1) + 1) / 3 for patch in stays["patch"]]
    balance = pd.read_csv(resorted / "kept/balance.csv")
    assert balance.to_dict("list") == {
        "label": ["negative", "mitosis"],
        "came_in": [35, 35],
        "noisy": [3, 3],
        "never_learned": [2, 2],
        "failed_validation": [1, 2],
        "remain": [29, 28],
        "level_0": [8, 6],
        "level_1": [8, 8],
        "level_2": [5, 6],
        "clean": [8, 8],
    }
    assert "failed_validation" in done.out
    assert json.loads((resorted / "kept/clus_scl/run.json").read_text())["balance"][1]["remain"] == 28


def test_keep_share(resorted):
    change(resorted / "learned/checked.csv", lambda table: table.assign(seen=10, correct=5))
    for share, expected in ((0.5, 44), (0.6, 0)):
        succeed("clus_scl.py", *keep_flags(resorted, resorted / "kept"), "--keep_share", share)
        table = pd.read_csv(resorted / "kept/SCL.csv")
        assert (table["level"] < 3).sum() == expected and (table["level"] == 3).sum() == 16


def test_label_without_patches_names_counts_and_constants(resorted):
    def no_clean_mitosis(table):
        clean = (table["verdict"] == "clean") & (table["label"] == 1)
        return table.assign(verdict=table["verdict"].where(~clean, "noisy"), hardness=table["hardness"].where(~clean))

    change(resorted / "sorted/hard.csv", no_clean_mitosis)
    change(resorted / "learned/checked.csv", lambda table: table.assign(correct=0))
    says = "no mitosis patch stays: of 35 that came in 11 are noisy, 2 were never learned, 22 failed validation"
    done = fails("clus_scl.py", *keep_flags(resorted, resorted / "kept"), says=says)
    assert "NOISY_SHARE" in done.err and "KEEP_SHARE" in done.err and not (resorted / "kept").exists()


KEEP_FAULTS = {
    "memory": ("memory.csv", lambda path: path.unlink(), "python DMU/main.py"),
    "hard": ("sorted/hard.csv", lambda path: path.unlink(), "python clus_hard.py"),
    "checked": ("learned/checked.csv", lambda path: path.unlink(), "python DMU/hard_main.py"),
    "unchecked": ("learned/checked.csv", lambda path: change(path, lambda t: t[1:]), "lacks 1 of the 44"),
    "not hard": (
        "sorted/hard.csv",
        lambda path: change(path, lambda t: t.assign(verdict="clean", level="", hardness=0)),
        "lacks 44",
    ),
    "level": ("learned/checked.csv", lambda path: change(path, lambda t: t.assign(level=1)), "has level"),
    "other memory": ("memory.csv", lambda path: change(path, lambda t: t.assign(noise_score=0.3)), "noise_score"),
    "correct": ("learned/checked.csv", lambda path: change(path, lambda t: t.assign(correct=9)), "correct 9 of 2"),
}


@pytest.mark.parametrize("name", KEEP_FAULTS)
def test_bad_input_of_stage_7(resorted, name):
    path, spoil, says = KEEP_FAULTS[name]
    spoil(resorted / path)
    fails("clus_scl.py", *keep_flags(resorted, resorted / "kept"), says=says)
    assert not (resorted / "kept").exists()
