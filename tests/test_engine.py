"""The engines that score patches on a CPU: the same probabilities, which one is taken, and what is said of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import ROOT, fails, succeed

from dasc.detect.candidates import find_candidates
from dasc.detect.cutter import PatchCutter
from dasc.errors import InputError
from dasc.images.read import read_field
from dasc.model import engine
from dasc.model.checkpoint import load_detector
from dasc.model.engine import CLOSE, INSTALL, OpenVino, PatchEngine
from dasc.model.inference import device_of, score_patches
from dasc.model.network import CamNetwork, fold_batch_norms

needs_openvino = pytest.mark.skipif(not engine.is_installed(), reason=f"needs OpenVINO ({INSTALL})")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return fold_batch_norms(CamNetwork("resnet10t"))


@pytest.fixture
def broken(monkeypatch):
    """OpenVINO seems to be there, and cannot run the network."""

    def compile_none(*given):
        raise RuntimeError("No conversion rule for an operation\nand more of it")

    monkeypatch.setattr(engine, "is_installed", lambda: True)
    monkeypatch.setattr(engine, "_compile", compile_none)


def model(small_run) -> list[object]:
    return ["--model_path", small_run / "NS/model.pt", "--device", "cpu"]


def field_patches(size: int, count: int) -> torch.Tensor:
    """Patches of nuclei of real tissue."""
    image = read_field(ROOT / "docs/example/Case_13-01.jpg")
    points_px, _ = find_candidates(image, 0.25)
    return PatchCutter(image, 0.25, 0.25, size).cut_tensor(points_px[:count])


@needs_openvino
@pytest.mark.parametrize("backbone", ["shipped", "resnet10t"])
def test_both_engines_give_the_same_probabilities(backbone, resnet):
    shipped = load_detector(ROOT / "weights/dasc_mitos.pt", CPU)
    network, size = (shipped.network, shipped.patch_size) if backbone == "shipped" else (resnet, 64)
    patches = field_patches(size, 75)  # 4 batches of 16 and one of 11
    openvino = OpenVino(network, [torch.rand(2, 3, size, size)], backbone)
    assert openvino.name.startswith("openvino 2") and device_of(openvino) == CPU
    threads = torch.get_num_threads()
    for cores, views in ((1, 1), (2, 1), (1, 8)):
        torch.set_num_threads(cores)
        try:
            ours, theirs = (score_patches(one, patches, 256, views) for one in (openvino, network))
        finally:
            torch.set_num_threads(threads)
        assert len(theirs.unique()) > 50 and (ours - theirs).abs().max() < CLOSE
    assert score_patches(openvino, patches[:0], 256).shape == (0,)


@needs_openvino
def test_other_log_odds_are_refused(resnet, monkeypatch):
    torch.manual_seed(1)
    other, compile_it = fold_batch_norms(CamNetwork("resnet10t")), engine._compile
    monkeypatch.setattr(engine, "_compile", lambda network, *given: compile_it(other, *given))
    with pytest.raises(InputError, match="other log odds"):
        OpenVino(resnet, [torch.rand(2, 3, 64, 64)], "resnet10t")


@needs_openvino
def test_auto_takes_openvino_where_it_pays(resnet, monkeypatch, capsys):
    monkeypatch.setattr(engine, "PAYS_PX", 1000)
    pays = 1000 * torch.get_num_threads()
    few, many = (PatchEngine(resnet, "auto", 64, images) for images in (1, 4))
    assert few.network_for(pays - 1) is resnet and few.used == ["torch"]
    assert isinstance(many.network_for(pays // 4 + 1), OpenVino)
    assert isinstance(many.network_for(1), OpenVino) and len(many.used) == 1  # the start is paid
    assert isinstance(few.network_for(pays), OpenVino) and few.used == ["torch", *many.used]
    assert capsys.readouterr().out.splitlines().count(f"engine: {many.used[0]}") == 2
    done = PatchEngine(resnet, "auto", 64, 0)  # all images were finished by an earlier run
    assert done.network_for(9 * pays) is resnet and not done.used
    assert PatchEngine(resnet, "torch", 64, 4).network_for(pays) is resnet


@needs_openvino
def test_predict_finds_the_same_with_both(small_run, tmp_path):
    images = sorted(Path(small_run / "sample/images").iterdir())[:2]
    flags = [*model(small_run), "--images", *images, "--overlays", "False", "--report", "False"]
    found = {}
    for name in ("torch", "openvino"):
        done = succeed("predict.py", *flags, "--smallest", 0, "--engine", name, "--out", tmp_path / name)
        used = json.loads((tmp_path / name / "run.json").read_text())["engine"]
        assert len(used) == 1 and used[0].split()[0] == name and done.out.count(f"engine: {used[0]}") == 1
        found[name] = pd.read_csv(tmp_path / name / "detections.csv").sort_values(["image", "y_px", "x_px"])
    ours, theirs = found.values()
    places = ["image", "x_px", "y_px"]
    assert len(ours) > 20
    pd.testing.assert_frame_equal(ours[places].reset_index(drop=True), theirs[places].reset_index(drop=True))
    assert np.abs(ours["probability"].to_numpy() - theirs["probability"].to_numpy()).max() < CLOSE


@needs_openvino
def test_the_search_of_stage_3_takes_it_too(small_run, tmp_path):
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--patch_size", 64, "--random_per_field", 2]
    flags += [*model(small_run), "--fp_mdoel", True, "--search_above", 0.3]
    tables = []
    for name in ("torch", "openvino"):
        succeed("pre/cut_patch_2.py", *flags, "--engine", name, "--out", tmp_path / name)
        assert json.loads((tmp_path / name / "run.json").read_text())["engine"][0].startswith(name)
        tables.append(pd.read_csv(tmp_path / name / "patches.csv"))
    assert (tables[0]["origin"] == "searched").any()
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=CLOSE)


@needs_openvino
def test_openvino_reports_nothing(tmp_path):
    """Its telemetry is never imported, which OpenVINO itself does wherever it is installed."""
    (tmp_path / "openvino_telemetry/backend").mkdir(parents=True)
    for name in ("__init__.py", "backend/__init__.py", "backend/backend_ga4.py"):
        (tmp_path / "openvino_telemetry" / name).write_text("print('reports')\nTelemetry = object\n")
    made = "PatchEngine(CamNetwork('resnet10t').eval(), 'openvino', 32, 0)"
    start = f"from dasc.model.engine import *; {made}; print('done')"
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["done"], done.stderr
    assert "Warning" not in done.stderr


def test_without_openvino_auto_takes_torch(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    monkeypatch.setattr(engine, "PAYS_PX", 0)
    image = sorted(Path(small_run / "sample/images").iterdir())[0]
    flags = [*model(small_run), "--images", image, "--out", tmp_path, "--report", "False"]
    assert succeed("predict.py", *flags).out.count("engine: torch\n") == 1
    assert json.loads((tmp_path / "run.json").read_text())["engine"] == ["torch"]
    done = fails("predict.py", *flags, "--engine", "openvino", says=INSTALL)
    assert done.err.count("error") == 1


def test_openvino_runs_on_the_cpu_only(small_run, tmp_path, resnet):
    with pytest.raises(InputError, match="--engine openvino: runs on the CPU, not on meta; add --device cpu"):
        PatchEngine(CamNetwork("resnet10t").to("meta"), "openvino", 64, 1)
    on_device = PatchEngine(CamNetwork("resnet10t").to("meta"), "auto", 64, 1)
    assert isinstance(on_device.network_for(10**12), CamNetwork) and on_device.used == ["torch"]
    flags = [*model(small_run), "--images", small_run / "sample/images", "--out", tmp_path]
    fails("predict.py", *flags, "--engine", "openvino", "--device", "cuda", says="cuda")


def test_a_network_that_openvino_cannot_run(resnet, broken, monkeypatch, capsys):
    says = "--engine openvino: cannot run resnet10t (No conversion rule for an operation); take torch"
    with pytest.raises(InputError) as error:
        PatchEngine(resnet, "openvino", 64, 1)
    assert str(error.value) == says
    monkeypatch.setattr(engine, "PAYS_PX", 0)
    auto = PatchEngine(resnet, "auto", 64, 2)
    assert auto.network_for(1) is resnet and auto.network_for(1) is resnet and auto.used == ["torch"]
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"OpenVINO is not taken: {says}"] and said.out == "engine: torch\n"
