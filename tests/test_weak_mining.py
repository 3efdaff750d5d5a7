"""Hard negative mining as a user runs it: the README's commands, what may be mined, and what is said when it cannot."""

import json
import re
import shlex
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import LIGHT, ROOT, check_run_json, fails, marked_commands, succeed

from dasc.data.cut import read_cut, write_cut
from dasc.data.patches import read_patch, write_patch
from dasc.data.tables import read_patches
from dasc.images.read import read_field
from dasc.model.checkpoint import load_detector
from dasc.model.inference import embed_patches
from dasc.weak.mining import distance

SHARED = ROOT.parent / "shared/data"
HARD, WEAK = "data/hard_labeled_dataset", "data/weakly_labeled_dataset"
LIGHTER = {
    "pre/split_patches.py": ["--patch_size", 32],
    "NS/sigle.py": [*LIGHT, "--epochs", 1],
    "NS/weak_mining.py": ["--k", 3, "--device", "cpu", "--batch_size", 16],
}


def draw(path, seed, ring=False, size=40):
    """Noise on several scales, with a dark ring where it is positive."""
    rng = np.random.default_rng(seed)
    image = sum(cv2.resize(rng.normal(size=(n, n, 3)), (size, size)) * 50 / n**0.5 for n in (3, 9, 20)) + 150
    if ring:
        cv2.circle(image, (size // 2, size // 2), size // 4, (60, 30, 60), 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8))


def commands() -> list[str]:
    return marked_commands("weak")


def mine(folder, *flags, out="mined"):
    paths = ["--manifest", folder / "data/patches_weak/patches.csv", "--model_path", folder / "results/weak/model.pt"]
    paths += ["--pool", folder / WEAK, "--out", folder / out, "--features", folder / "features"]
    return ["NS/weak_mining.py", *paths, *LIGHTER["NS/weak_mining.py"], *flags]


@pytest.fixture(scope="session")
def hierarchy(tmp_path_factory):
    """The system's hierarchy with a weak model: val slide A1, test slide A2; not to be changed."""
    folder = tmp_path_factory.mktemp("hierarchy")
    for number in range(24):
        label, slide = ("pos", "neg")[number % 2], f"A{number // 2 % 4 + 1}"
        draw(folder / HARD / f"{label}_{slide}_{number}-5.{'jpg' if number % 3 else 'png'}", number, label == "pos")
    for number in range(30):
        draw(folder / WEAK / f"B{number % 3}_{number}-5.{'jpg' if number % 3 else 'png'}", 100 + number)
    held = sorted(path for path in (folder / HARD).iterdir() if re.match("neg_A[12]_", path.name))
    for number, path in enumerate(held):  # the same tissue again, under another slide's name, turned and compressed
        copy = np.rot90(cv2.imread(str(path)), number)
        cv2.imwrite(str(folder / WEAK / f"C1_{number}-0.jpg"), copy, [cv2.IMWRITE_JPEG_QUALITY, 60])
    for number, slide in enumerate(("A1", "A2")):  # and other tissue of the slides of val and test
        draw(folder / WEAK / f"neg_{slide}_{900 + number}-5.png", 900 + number)
    labelled = ["--labelled", folder / HARD, "--val", "A1", "--test", "A2", "--out", folder / "data/patches_weak"]
    succeed("pre/split_patches.py", *labelled, *LIGHTER["pre/split_patches.py"])
    manifest = folder / "data/patches_weak/patches.csv"
    succeed("NS/sigle.py", *LIGHTER["NS/sigle.py"], "--manifest", manifest, "--out", folder / "results/weak")
    return folder


@pytest.fixture
def here(hierarchy, tmp_path):
    shutil.copytree(hierarchy, tmp_path / "h")
    return tmp_path / "h"


def test_readme_commands(hierarchy, tmp_path, monkeypatch):
    typed = commands()
    scripts = [shlex.split(command, comments=True)[0] for command in typed]
    assert scripts == ["pre/split_patches.py", "NS/sigle.py", "NS/weak_mining.py", "NS/sigle.py"]
    shutil.copytree(hierarchy / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/patches_weak")
    monkeypatch.chdir(tmp_path)
    for command in typed:
        script, *flags = shlex.split(command, comments=True)
        succeed(script, *flags, *LIGHTER[script])
    for name in ("data/patches_weak", "results/weak", "data/patches_mined", "results/strong"):
        check_run_json(tmp_path / name / "run.json")
    assert (tmp_path / "results/strong/model.pt").is_file()


@pytest.mark.parametrize("query", ["l2", "cosine", "random", "searched"])
def test_what_is_mined(hierarchy, tmp_path, query):
    flags = ["--query", query, "--fp_above", 0.01, "--search_above", 0.01]
    done = succeed(*mine(hierarchy, *flags, out=tmp_path / "mined"))
    before, after = (
        read_patches(folder / "patches.csv") for folder in (hierarchy / "data/patches_weak", tmp_path / "mined")
    )
    mined = pd.read_csv(tmp_path / "mined/mined.csv", keep_default_na=False)
    assert after[: len(before)].equals(before)
    added = after[len(before) :]
    assert added["patch"].tolist() == mined["patch"].tolist() and len(mined)
    assert (added["split"] == "train").all() and (added["label"] == 0).all() and (added["origin"] == "mined").all()
    assert mined["pool_patch"].is_unique
    assert not mined["pool_patch"].str.contains("A1_|A2_|C1_").any()  # slides and pictures of val and test
    assert added["case"].tolist() == mined["pool_patch"].str.extract(r"^(B\d)_")[0].tolist()
    for patch, source in mined[["patch", "pool_patch"]].itertuples(index=False):
        whole = read_field(hierarchy / WEAK / source)
        expected = cv2.resize(whole, (32, 32), interpolation=cv2.INTER_AREA)
        assert (read_patch(tmp_path / "mined" / patch) == expected).all()
    sheet = cv2.imread(str(tmp_path / "mined/contact_sheet.png"))
    assert sheet.shape[1] > 12 * 112 and sheet.std() > 5
    facts = json.loads((tmp_path / "mined/run.json").read_text())
    assert facts["mined"] == len(mined) and facts["left_out"]["of val or test slides"] == 2
    assert "2 of val or test slides" in done.out
    if query == "searched":
        assert len(mined) == 30 and facts["left_out"]["near-duplicates of labelled patches"] == 6


def test_nearest_to_the_false_positive_it_names(hierarchy, tmp_path):
    """mined.csv against features computed one patch at a time."""
    succeed(*mine(hierarchy, "--fp_above", 0.01, out=tmp_path / "mined"))
    network = load_detector(hierarchy / "results/weak/model.pt", torch.device("cpu")).network

    def features(image):
        found, score = embed_patches(network, torch.from_numpy(image).permute(2, 0, 1)[None], 1)
        return found[0].astype(np.float16), float(score[0])

    errors = pd.read_csv(tmp_path / "mined/false_positives.csv")
    assert len(errors) == 3 and errors["probability"].is_monotonic_decreasing
    assert errors["patch"].str.startswith("val/negative/neg_A1_").all()
    queries = [features(read_patch(hierarchy / "data/patches_weak" / patch)) for patch in errors["patch"]]
    assert [score for _, score in queries] == pytest.approx(errors["probability"].tolist(), abs=1e-5)
    allowed = sorted(path.name for path in (hierarchy / WEAK).glob("B*"))
    pool = np.array(
        [
            features(cv2.resize(read_field(hierarchy / WEAK / name), (32, 32), interpolation=cv2.INTER_AREA))[0]
            for name in allowed
        ]
    )
    every = np.array([distance(query, pool, "l2") for query, _ in queries])
    chosen = sorted({int(row) for one in every for row in np.argsort(one)[:3]})
    mined = pd.read_csv(tmp_path / "mined/mined.csv")
    assert mined["pool_patch"].tolist() == [allowed[row] for row in chosen]
    owners = np.where(np.argsort(np.argsort(every, axis=1), axis=1)[:, chosen] < 3, every[:, chosen], np.inf)
    assert mined["false_positive"].tolist() == [errors["patch"][row] for row in owners.argmin(axis=0)]
    assert mined["distance"].to_numpy() == pytest.approx(owners.min(axis=0), rel=0.01)
    assert mined["answers"].tolist() == np.isfinite(owners).sum(axis=0).tolist()


def test_random_takes_as_many_as_l2_and_others_by_seed(hierarchy, tmp_path):
    taken = {}
    for name, flags in {
        "l2": ["--query", "l2"],
        0: ["--query", "random"],
        1: ["--query", "random", "--seed", 1],
    }.items():
        succeed(*mine(hierarchy, *flags, "--fp_above", 0.01, out=tmp_path / str(name)))
        taken[name] = pd.read_csv(tmp_path / str(name) / "mined.csv")
    assert len(taken["l2"]) == len(taken[0]) == len(taken[1])
    assert taken[0]["distance"].isna().all() and taken[0]["false_positive"].isna().all()
    assert set(taken[0]["pool_patch"]) != set(taken[1]["pool_patch"])


def test_rerun_gives_the_same_bytes_and_keeps_the_older(here):
    flags = ["--fp_above", 0.01]
    succeed(*mine(here, *flags))
    first = {name: (here / "mined" / name).read_bytes() for name in ("mined.csv", "patches.csv")}
    features = next((here / "features").iterdir())
    written = features.stat().st_mtime_ns, features.stat().st_size
    succeed(*mine(here, *flags))
    assert (features.stat().st_mtime_ns, features.stat().st_size) == written
    for name, content in first.items():
        assert (here / "mined" / name).read_bytes() == content
        assert (here / "mined.previous" / name).read_bytes() == content


def test_a_second_round_takes_others(here):
    """The strong model's errors are mined in turn, into the same folder; the first round's patches stay."""
    succeed(*mine(here, "--fp_above", 0.01))
    first = read_patches(here / "mined/patches.csv")
    succeed("NS/sigle.py", *LIGHTER["NS/sigle.py"], "--manifest", here / "mined/patches.csv", "--out", here / "strong")
    again = ["--manifest", here / "mined/patches.csv", "--model_path", here / "strong/model.pt"]
    succeed(*mine(here, "--fp_above", 0.0, *again))
    second = read_patches(here / "mined/patches.csv")
    assert second[: len(first)].equals(first) and len(second) > len(first)
    mined = [pd.read_csv(here / folder / "mined.csv") for folder in ("mined.previous", "mined")]
    assert not set(mined[0]["pool_patch"]) & set(mined[1]["pool_patch"])
    assert all((here / "mined" / patch).is_file() for patch in second["patch"])


def test_unknown_slides(here):
    draw(here / WEAK / "example_1.png", 77)
    fails(*mine(here), says="--unknown_slides True")
    succeed(*mine(here, "--unknown_slides", "True", "--fp_above", 0.01, "--query", "searched", "--search_above", 0.01))
    assert "example_1.png" in set(pd.read_csv(here / "mined/mined.csv")["pool_patch"])


def without_pool(here):
    shutil.rmtree(here / WEAK)
    (here / WEAK).mkdir()


def only_held(here):
    for path in (here / WEAK).glob("[BC]*"):
        path.unlink()


def broken(here):
    path = here / WEAK / "B1_1-5.jpg"
    path.write_bytes(path.read_bytes()[:300])


def other_size(here):
    draw(here / WEAK / "B9_1-5.png", 5, size=41)


def other_manifest(here):
    path = here / "data/patches_weak/patches.csv"
    path.write_text(path.read_text().replace("annotated", "random"))


BAD = {
    "no false positive": (None, ["--fp_above", 1], "lower --fp_above"),
    "nothing searched": (None, ["--query", "searched", "--search_above", 1], "lower --search_above"),
    "empty pool": (without_pool, [], "no image in this folder"),
    "all held": (only_held, [], "only 0 of the 2 pool patches lie on other slides"),
    "k beyond the pool": (None, ["--k", 37], "only 36 of the 38 pool patches lie on other slides"),
    "k beyond what may be mined": (None, ["--k", 33, "--fp_above", 0.01], "only 30 pool patches may be mined"),
    "broken": (broken, ["--fp_above", 0.01], "B1_1-5.jpg"),
    "size": (other_size, ["--fp_above", 0.01], "41 x 41 px, expected 40 x 40"),
    "manifest": (other_manifest, [], "was not trained on"),
    "no model": (lambda here: (here / "results/weak/model.pt").unlink(), [], "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_writes_nothing(here, name):
    change, flags, says = BAD[name]
    if change:
        change(here)
    before = sorted(path.name for path in here.iterdir() if path.name != "features")
    fails(*mine(here, *flags), says=says)
    assert sorted(path.name for path in here.iterdir() if path.name != "features") == before


def test_another_folder_is_not_replaced(here):
    fails(*mine(here, out="data"), says="holds files but no mined.csv")


def test_mitoses_with_a_pool_cut_from_fields(small_run, tmp_path):
    """Any patches.csv, with another as the pool: its positives and its slides of val and test stay out."""
    manifest, model = small_run / "patches/patches.csv", small_run / "NS/model.pt"
    shutil.copytree(small_run / "patches", tmp_path / "pool")
    table = read_patches(manifest)
    common = ["--features", tmp_path / "f", "--fp_above", 0.0001, "--k", 5, "--sheet_rows", 3]
    common += ["--device", "cpu", "--out", tmp_path / "mined"]
    flags = ["--manifest", manifest, "--model_path", model, *common]
    fails("NS/weak_mining.py", *flags, "--pool", tmp_path / "pool/patches.csv", says="pool patches may be mined")
    for patch in table["patch"]:  # mirrored top to bottom they would be the same tissue still; scrambled they are not
        image = read_patch(tmp_path / "pool" / patch)
        write_patch(tmp_path / "pool" / patch, np.roll(image, (13, 29), axis=(0, 1)).transpose(2, 0, 1))
    succeed("NS/weak_mining.py", *flags, "--pool", tmp_path / "pool/patches.csv")
    mined = pd.read_csv(tmp_path / "mined/mined.csv", dtype=str)
    assert set(mined["pool_patch"]) <= set(table.loc[(table["split"] == "train") & (table["label"] == 0), "patch"])
    added = read_patches(tmp_path / "mined/patches.csv")[len(table) :]
    assert added["x_px"].notna().all() and added["case"].tolist() == mined["case"].tolist()
    train = ["--manifest", tmp_path / "mined/patches.csv", "--out", tmp_path / "NS", "--epochs", 1, "--views", 1]
    done = succeed("NS/sigle.py", *LIGHT, *train)
    assert "validation F1" in done.out
    write_cut(tmp_path / "pool", read_cut(tmp_path / "pool")._replace(normalise_stain=False))
    fails("NS/weak_mining.py", *flags, "--pool", tmp_path / "pool/patches.csv", says="normalise_stain False")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_lymphatic_invasion_runs_through(tmp_path, monkeypatch):
    """Eight real patches and a pool cut from another slide: that every step runs, no more."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHARED / "lymphatic_invasion", HARD, ignore=shutil.ignore_patterns("*.md"))
    for path in [tmp_path / HARD, *(tmp_path / HARD).iterdir()]:
        path.chmod(0o755)
    # Its negatives are of one slide: one of them plays another, so that training and val both have some.
    (tmp_path / HARD / "neg_A00047_19603-15481.png").rename(tmp_path / HARD / "neg_A00048_19603-15481.png")
    slide = read_field(SHARED / "wsi/cmu-1-small-region.svs")
    (tmp_path / WEAK).mkdir()
    for y in range(0, 2560, 512):
        for x in range(0, 2048, 512):
            write_patch(tmp_path / WEAK / f"CMU1_{x}-{y}.png", slide[y : y + 512, x : x + 512].transpose(2, 0, 1))
    for command in commands():
        script, *flags = shlex.split(command, comments=True)
        lighter = [*flags, "--val", "A00047"] if script == "pre/split_patches.py" else [*flags, *LIGHTER[script]]
        succeed(script, *lighter)
    mined = pd.read_csv("data/patches_mined/mined.csv")
    assert len(mined) >= 3 and mined["false_positive"].str.startswith("val/negative/neg_A00047").all()
