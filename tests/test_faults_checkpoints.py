"""Checkpoints from elsewhere through every script that reads one: no code runs, and what does not fit is said."""

import os
import pickle
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import sample_flags
from pipeline import LIGHT, fails, succeed

from dasc.model.checkpoint import read_checkpoint, save_checkpoint
from dasc.model.network import DualNetwork


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm done",)


def make_broken(folder, model):
    """Files that are no checkpoint of ours: name and what the error says."""
    torch.save({"model": Harm(), "config": {}}, folder / "code.pt")
    (folder / "bare_code.pt").write_bytes(pickle.dumps(Harm()))
    (folder / "truncated.pt").write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    whole = bytearray(model.read_bytes())
    whole[: len(whole) // 8] = bytes(len(whole) // 8)
    (folder / "zeros.pt").write_bytes(whole)
    (folder / "empty.pt").touch()
    return ["code.pt", "bare_code.pt", "truncated.pt", "zeros.pt", "empty.pt"]


READERS = {
    "predict": ("predict.py", ["--images", "sample/images", "--model_path"]),
    "stage 3": ("pre/cut_patch_2.py", ["--data_root", "sample", "--fp_mdoel", "--model_path"]),
    "weak mining": ("NS/weak_mining.py", ["--manifest", "patches/patches.csv", "--pool", "patches/patches.csv"]),
    "stage 2 starts": ("NS/sigle.py", [*LIGHT, "--manifest", "patches/patches.csv", "--init_weights"]),
    "stage 2 resumes": ("NS/sigle.py", [*LIGHT, "--manifest", "patches/patches.csv", "--resume"]),
    "stage 4 resumes": ("DMU/main.py", [*LIGHT, "--manifest", "patches/patches.csv", "--resume"]),
    "stage 6 resumes": ("DMU/hard_main.py", [*LIGHT, "--manifest", "patches/patches.csv", "--hard", "hard.csv"]),
    "stage 8 resumes": ("DMU/hard_scl_main.py", [*LIGHT, "--manifest", "patches/patches.csv", "--scl", "SCL.csv"]),
}


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """Links to the small run, and tables for stages 6 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("sample", "patches", "NS"):
        shutil.copytree(small_run / name, folder / name)
    patches = pd.read_csv(folder / "patches/patches.csv")
    train = patches.loc[patches["split"] == "train", ["patch", "label"]]
    train.assign(level=3, hardness=0).to_csv(folder / "SCL.csv", index=False)
    level = np.arange(len(train)) % 3
    hard = train.assign(verdict="hard", level=level, hardness=(level + 1) / 3)
    hard.assign(forget_rate=0.5, centroid_distance=0.5, noise_score=0.5).to_csv(folder / "hard.csv", index=False)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_no_checkpoint_runs_code_and_broken_ones_are_refused(folder, tmp_path, monkeypatch, reader):
    monkeypatch.chdir(folder)
    script, flags = READERS[reader]
    for name in make_broken(tmp_path, folder / "NS/model.pt"):
        here = list(flags)
        if "resumes" in reader:
            (tmp_path / "out").mkdir(exist_ok=True)
            shutil.copy(tmp_path / name, tmp_path / "out/last.pt")
            here += ["--resume"] if "--resume" not in here else []
        else:
            here += (["--model_path"] if reader == "weak mining" else []) + [tmp_path / name]
        done = fails(script, *here, "--out", tmp_path / "out", says="not a readable checkpoint, or one that would run")
        assert (name if "resumes" not in reader else "last.pt") in done.err
        left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
        assert [one.name for one in left] == (["last.pt"] if "resumes" in reader else [])
        assert not (folder / "harm done").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_harmful_files_would_do_harm(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_broken(tmp_path, folder / "NS/model.pt")
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "harm done").is_dir()
    (tmp_path / "harm done").rmdir()
    pickle.loads((tmp_path / "bare_code.pt").read_bytes())
    assert (tmp_path / "harm done").is_dir()


@pytest.mark.parametrize("script", ["NS/sigle.py", "DMU/main.py", "DMU/hard_scl_main.py", "DMU/hard_main.py"])
def test_a_model_is_no_interrupted_training(folder, tmp_path, monkeypatch, script):
    monkeypatch.chdir(folder)
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "NS/model.pt", tmp_path / "out/last.pt")
    flags = next(flags for one, flags in READERS.values() if one == script and "--init_weights" not in flags)
    flags = [flag for flag in flags if flag != "--resume"]
    fails(script, *flags, "--resume", "--out", tmp_path / "out", says="leave out --resume")


def changed(folder, path, change):
    content = read_checkpoint(folder / "NS/model.pt")
    change(content)
    save_checkpoint(path, content)
    return path


def config(**values):
    return lambda content: content["config"].update(values)


MISFITS = {
    "classes": (config(classes=["mitosis", "negative"]), ["['mitosis', 'negative']", "['negative', 'mitosis']"]),
    "no classes": (config(classes=2), ["its classes are 2, expected"]),
    "backbone": (config(backbone="resnet10t"), ["do not fit its own config (resnet10t)"]),
    "a hub's backbone": (config(backbone="hf-hub:someone/model"), ["unknown backbone 'hf-hub:someone/model'"]),
    "no um/px": (config(um_per_px=0.0), ["unknown resolution"]),
    "dual": (config(network="dual"), ["dual network of stage 4", "expected a model of stage 2"]),
    "no weights": (lambda content: content.update(model=[1, 2]), ["do not fit its own config"]),
    "no config": (lambda content: content.update(config=["backbone"]), ["not a checkpoint of this project"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_predict(folder, tmp_path, name):
    change, says = MISFITS[name]
    content = torch.load(folder / "NS/model.pt", weights_only=True)
    change(content)
    save_checkpoint(tmp_path / "model.pt", content)
    flags = ["--images", folder / "sample/images", "--device", "cpu", "--out", tmp_path / "out"]
    done = fails("predict.py", *flags, "--model_path", tmp_path / "model.pt", says=says[0])
    assert all(words in done.err for words in says) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("patch_size", 80), ("um_per_px", 0.5), ("normalise_stain", False)])
def test_a_model_of_other_patches_is_refused_by_stage_3(folder, tmp_path, name, value):
    path = changed(folder, tmp_path / "model.pt", config(**{name: value}))
    here = {"patch_size": 64, "um_per_px": 0.25, "normalise_stain": True}[name]
    flag = name.replace("um_per_px", "patch_um_per_px")
    flags = [*sample_flags(folder), "--fp_mdoel", "--model_path", path, "--out", tmp_path / "out"]
    fails("pre/cut_patch_2.py", *flags, says=f"trained at {flag} {value}, these patches have {here}")


def test_the_dual_networks_own_checkpoint_is_refused_by_predict(folder, tmp_path):
    network = DualNetwork("mobilenetv3_small_100")
    change = lambda content: content.update(model=network.state_dict()) or config(network="dual")(content)  # noqa: E731
    path = changed(folder, tmp_path / "model.pt", change)
    fails("predict.py", "--images", folder / "sample/images", "--model_path", path, says="stage 2 (NS) or 8 (DMU_scl)")


def on_cuda(path, to):
    """A copy of a checkpoint as a GPU would have written it: its pickle says where every storage lay."""
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(to, "w") as moved:
        for part in whole.infolist():
            data = whole.read(part)
            if part.filename.endswith("data.pkl"):
                text = b"X\x03\0\0\0cpu"
                assert text in data
                data = data.replace(text, b"X\x06\0\0\0cuda:0")
            moved.writestr(part.filename, data)


def test_a_checkpoint_of_a_gpu_loads_on_the_cpu(folder, tmp_path):
    on_cuda(folder / "NS/model.pt", tmp_path / "model.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "model.pt", weights_only=True)
    outs = {}
    for name, path in (("cpu", folder / "NS/model.pt"), ("cuda", tmp_path / "model.pt")):
        flags = ["--images", folder / "sample/images/009.tiff", "--device", "cpu", "--views", 1, "--report", "False"]
        succeed("predict.py", *flags, "--threshold", 0.3, "--model_path", path, "--out", tmp_path / name)
        outs[name] = (tmp_path / name / "detections.csv").read_bytes()
    assert outs["cpu"] == outs["cuda"] and outs["cpu"].count(b"\n") > 1
