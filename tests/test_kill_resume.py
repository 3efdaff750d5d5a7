"""Killed by SIGKILL at random moments and gone on with by --resume, every stage gives what it gives uninterrupted.

One run is killed several times over: in every life it goes on from what the last one left. A life that ended before
its kill, or was killed at another moment than the one drawn, is lived again from the same files.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from filelock import FileLock
from moments import Moment, run_child
from pipeline import LIGHT, ROOT, fails, readme_commands, succeed

import dasc.detect.slide
from dasc.data.pack import PACK
from dasc.images.read import read_field
from dasc.model.checkpoint import read_tensors, save_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks, and SIGKILL")
TIMES = ("run.json", "report.html")  # they tell when a run was; every other file must be the same to the last byte
DRAWS = 6

# Per command: what it writes, and the moments of its lives in order: what happens, and the first and last number to
# draw from. A life begins after the last one's checkpoint, so that its numbers count from there.
STAGES = {
    "pre/cut_patch_2.py": (
        "data/patches",
        [("patch", 40, 200), ("writing 010.json", 1, 1), ("putting the folder in place", 1, 1)],
    ),
    "pre/cut_patch_2.py --fp_mdoel True": (
        "data/patches_ns",
        [("patch", 40, 200), ("writing patches.csv", 1, 1), ("putting the folder in place", 1, 1)],
    ),
    "NS/sigle.py": (
        "results/NS",
        [("step", 1, 7), ("step", 8, 14), ("writing last.pt", 1, 1), ("writing log.csv", 1, 1), ("field", 1, 2)],
    ),
    "DMU/main.py": (
        "results/DMU",
        [("step", 8, 14), ("writing last.pt", 2, 2), ("writing log.csv", 1, 1), ("writing memory.csv", 1, 1)],
    ),
    "DMU/hard_main.py": (
        "results/DMU_hard",
        [("step", 3, 4), ("writing last.pt", 2, 3), ("step", 1, 1), ("writing checked.csv", 1, 1)],
    ),
    "DMU/hard_scl_main.py": (
        "results/DMU_scl",
        [("step", 3, 4), ("writing last.pt", 1, 1), ("writing log.csv", 1, 1), ("field", 1, 2)],
    ),
    "predict.py": ("results/predict", [("field", 1, 2), ("writing scan.json", 1, 1), ("writing detections.csv", 1, 1)]),
}


def draw(rng: random.Random, what: str, first: int, last: int) -> Moment:
    if what.startswith("writing "):  # a part of it is on the disk, or all but the name
        return Moment(what, rng.randint(first, last), rng.choice([rng.random(), 1.0]))
    return Moment(what, rng.randint(first, last), rng.uniform(0, 0.03))


def killed(rng, folder: Path, script: str, flags: list, moment: tuple, log: Path, prepare=None) -> str:
    """Run the script in this process's folder until it is killed at such a moment; say when it really was."""
    before = log.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(folder, before, symlinks=True)
    missed = []
    for _ in range(DRAWS):
        drawn = draw(rng, *moment)
        run = run_child(log, script, *flags, moment=drawn, prepare=prepare)
        if run.status == -signal.SIGKILL and run.happened[-1] == drawn.what:
            return str(drawn._replace(number=run.happened.count(drawn.what)))
        missed.append(f"{drawn}: ended with {run.status} after {run.happened[-1:]}\n{run.said}")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(before, folder, symlinks=True, dirs_exist_ok=True)
    raise AssertionError("\n".join(missed))


def live(folder: Path, script: str, flags: list, out: Path, moments: list, log: Path, seed: int, prepare=None) -> str:
    """Run the script through all its lives and to its end; say at which moments it was killed."""
    rng, fell = random.Random(f"{seed} {script} {flags}"), []
    go_on = []
    for moment in moments:
        fell.append(killed(rng, folder, script, [*flags, *go_on], moment, log, prepare))
        with FileLock(out.parent / f".{out.name}.lock", timeout=0):
            pass  # what the killed run held is free
        go_on = ["--resume"]
        trains = script.startswith(("NS", "DMU"))
        if trains and (out / "last.pt").is_file():
            torch.load(out / "last.pt", weights_only=True)
        elif trains:
            run = run_child(log, script, *flags, "--resume")
            assert run.status == 1 and run.said.count("\n") == 1 and "leave out --resume" in run.said
            go_on = []
    run = run_child(log, script, *flags, *go_on, prepare=prepare)
    assert run.status == 0, run.said
    left = [path for path in out.parent.rglob("*") if path.name.endswith((".tmp", ".partial", ".lock"))]
    assert not left
    return f"seed {seed}, killed at " + "; ".join(fell)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_same(found: Path, whole: Path, expected: list[str]) -> None:
    """Both folders hold these files, `found` no other, and their bytes are the same but for times."""
    assert names(found) == sorted(expected)
    for name in (name for name in expected if Path(name).name not in TIMES):
        one, other = found / name, whole / name
        if one.name == "last.pt":  # a state that was loaded again shares no strings, as pickle sees them
            assert same(*(torch.load(path, weights_only=True) for path in (one, other))), name
        elif one.name == PACK:  # behind the patches it tells when each file was written
            assert (np.load(one) == np.load(other)).all(), name
        else:
            assert one.read_bytes() == other.read_bytes(), name


def same(one, other) -> bool:
    """Tensors bit for bit, and everything round them."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_the_same(readme_run, tmp_path, monkeypatch, request, record_property, stage):
    place, moments = STAGES[stage]
    typed, script, flags = next(
        one for one in reversed(readme_commands()) if one[1 if stage == "predict.py" else 0] == stage
    )
    work = tmp_path / "work"
    for path in (*readme_run.glob("data/*"), *readme_run.glob("results/*")):
        link = work / path.relative_to(readme_run)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link != work / place:
            link.symlink_to(path)
    monkeypatch.chdir(work)
    seed = request.config.getoption("--seed")
    fell = live(work, script, flags, work / place, moments, tmp_path / "log", seed)
    record_property(stage, fell)
    made = json.loads((readme_run / "made.json").read_text())[typed]
    check_same(work / place, readme_run / place, [name.removeprefix(f"{place}/") for name in made])


def small_tiles():
    """In the child: tiles so small that the slide has many, and the progress kept after every other."""
    dasc.detect.slide.SAVE_EVERY = 2
    dasc.detect.slide.scan_slide.__kwdefaults__["tile_um"] = 50.0


def test_a_slide_is_gone_on_with_tile_by_tile(readme_run, tmp_path, monkeypatch, request, record_property):
    quarters = [read_field(path) for path in sorted((readme_run / "data/sample/images").iterdir())[:4]]
    image = np.concatenate([np.concatenate(quarters[:2]), np.concatenate(quarters[2:])], axis=1)
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb", tile=(256, 256), compression="deflate")
    flags = ["--images", tmp_path / "slide.tif", "--um_per_px", 0.25, "--whole_px", 1000, "--device", "cpu"]
    flags += ["--model_path", readme_run / "results/DMU_scl/model.pt", "--batch_size", 8, "--views", 2, "--smallest", 0]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    whole = run_child(tmp_path / "log", "predict.py", *flags, "--out", tmp_path / "whole", prepare=small_tiles)
    assert whole.status == 0, whole.said
    batches, saves = whole.happened.count("batch of tiles"), whole.happened.count("writing scan.json")
    assert saves > 6 and batches > 2 * saves
    moments = [("batch of tiles", batches // 4, batches // 2), ("writing scan.json", 1, 2), ("batch of tiles", 1, 4)]
    moments += [("writing detections.csv", 1, 1)]
    flags += ["--out", "predict"]
    fell = live(
        work,
        "predict.py",
        flags,
        work / "predict",
        moments,
        tmp_path / "log",
        request.config.getoption("--seed"),
        small_tiles,
    )
    record_property("predict.py, a slide", fell)
    check_same(work / "predict", tmp_path / "whole", names(tmp_path / "whole"))


def test_killed_from_outside(small_run, tmp_path, request, record_property):
    """As a user, a scheduler or a full memory kills it: a process of its own, at any moment after the first epoch."""
    rng = random.Random(request.config.getoption("--seed"))
    flags = [*LIGHT, "--epochs", 2, "--manifest", small_run / "patches/patches.csv", "--out", tmp_path / "out"]
    command = [sys.executable, ROOT / "NS/sigle.py", *flags]
    for _ in range(DRAWS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "out/last.pt").is_file():
            time.sleep(0.01)
        after = rng.uniform(0, 2)
        time.sleep(after)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
    else:
        pytest.fail(f"the run ended before each of {DRAWS} kills")
    epochs = len(read_tensors(tmp_path / "out/last.pt")["log"])
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    record_property(
        "a process", f"killed {after:.2f} s after the first epoch, {epochs} epochs in last.pt; there: {there}"
    )
    succeed("NS/sigle.py", *flags, "--resume")
    check_same(tmp_path / "out", small_run / "NS", names(small_run / "NS"))


def test_patches_are_gone_on_with_only_as_they_were_begun(small_run, tmp_path, monkeypatch):
    """Other settings, annotations or another model would mix patches of two kinds in one folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_run / "sample", "sample")
    shutil.copy(small_run / "NS/model.pt", "model.pt")
    flags = ["--data_root", "sample", "--patch_size", 64, "--random_per_field", 20, "--out", "out", "--device", "cpu"]
    flags += ["--fp_mdoel", "True", "--model_path", "model.pt"]
    killed(random.Random(0), tmp_path, "pre/cut_patch_2.py", flags, ("patch", 60, 90), tmp_path.parent / "log")
    flags.append("--resume")
    fails("pre/cut_patch_2.py", *flags, "--seed", 1, says="begun with other settings (seed 0, not 1)")
    annotations = Path("sample/MIDOG.json").read_text()
    Path("sample/MIDOG.json").write_text(annotations.replace('"category_id": 1', '"category_id": 2', 1))
    fails("pre/cut_patch_2.py", *flags, says="begun with other settings (annotations")
    Path("sample/MIDOG.json").write_text(annotations)
    model = read_tensors(Path("model.pt"))
    save_checkpoint(Path("model.pt"), {**model, "config": {**model["config"], "threshold": 0.5}})
    fails("pre/cut_patch_2.py", *flags, says="begun with other settings (model")
    Path("out.partial/settings.json").write_text("{")
    fails("pre/cut_patch_2.py", *flags, says="leave out --resume")
    Path("out.partial/settings.json").unlink()
    Path("out.partial/train/negative/of_other_settings.png").touch()
    succeed("pre/cut_patch_2.py", *flags)
    named = {row.split(",")[0] for row in Path("out/patches.csv").read_text().splitlines()[1:]}
    assert named == {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
