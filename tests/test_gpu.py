"""The command for a machine with a GPU: every part works on a CPU, small; its checks run on a GPU where one is."""

import importlib.util
import json
import shutil
import subprocess
import zipfile

import gpu
import pandas as pd
import pytest
import torch
from gpu_checks import CHECKS, Case
from gpu_speed import NO_GPU
from gpu_training import row_of
from packed import pack, unpack
from pipeline import ROOT

from dasc.errors import InputError
from dasc.images.read import read_field


@pytest.fixture(scope="module")
def packed(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "packed.zip"
    return out, pack(small_run / "patches", out, "", 40.0)


def test_every_part_works_on_a_cpu(packed, tmp_path):
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--quick", "--patches", packed[0], "--out", out, "--last_stage", 2, "--workers", 2]
    assert gpu.main(gpu.read_arguments([str(word) for word in words])) == 0
    content = json.loads(out.read_text())
    parts = content["parts"]
    only_cuda = {"check: memory full", "check: steps that cannot be recorded", "field: kernels, ms and calls"}
    assert {name for name, part in parts.items() if part["status"] == NO_GPU} == only_cuda
    assert {part["status"] for name, part in parts.items() if name not in only_cuda} == {"ok"}
    assert list(parts)[-2:] == ["stage 2", "stage 2, test fields"] and parts["stage 2"]["epochs"] == 1
    assert parts["patches"]["splits"]["train"] > 20 and parts["stage 2, test fields"]["metrics"]["fn"] >= 0
    measured = [parts["field"]["dasc_mitos.pt"], parts["slide"], parts["subclass loss"]]
    measured.append(parts["steps"]["mobilenetv3_small_100"])
    assert {one["goal_reached"] for one in measured} == {NO_GPU}  # no figure of a CPU stands where a GPU's belongs
    for one in measured[:2]:
        assert one["seconds"] > 0 and one["profile"]["first look"]["calls"] > 0
        network = one["profile"].get("network") or one["profile"]["both looks: network"]
        assert network["seconds"] > 0
    assert measured[1]["profile"]["reading regions, overview included"]["calls"] > 0
    assert content["rows"] == [] and NO_GPU in content["device"]
    text = out.with_suffix(".md").read_text()
    assert "no figure counts" in text and all(f"| {name} |" in text for name in parts)


@pytest.mark.parametrize(("part", "work"), [("checks", "check"), ("speed", "measure"), ("training", "train")])
def test_a_part_can_be_run_alone(packed, tmp_path, monkeypatch, part, work):
    done = []
    for name in ("check", "measure", "train"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name: done.append(name))
    words = ["--device", "cpu", "--quick", "--patches", packed[0], "--out", tmp_path / "gpu.json", "--parts", part]
    assert gpu.main(gpu.read_arguments([str(word) for word in words])) == 0
    assert done == [work]


def test_a_part_that_fails_is_recorded_and_the_next_one_goes_on(tmp_path):
    results = gpu.Results(gpu.read_arguments(["--out", str(tmp_path / "a.json")]), torch.device("cpu"))

    def broken():
        raise ValueError("no such\nkernel")

    assert not results.run("broken", broken)
    assert results.run("sound", lambda: {"figure": 3})
    results.minutes = 0
    assert not results.run("late", lambda: {"figure": 4})
    parts = json.loads((tmp_path / "a.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "ok", "out of time"]
    assert parts["broken"]["error"] == "ValueError: no such\nkernel" and parts["sound"]["figure"] == 3
    assert results.unfinished() == ["broken", "late"]
    assert "ValueError: no such" in (tmp_path / "a.md").read_text()


def test_a_stage_that_hangs_is_stopped(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_stage("NS/sigle.py", [], tmp_path, left_s=0.01, apart=True)


def test_packed_patches_come_back_to_the_byte(small_run, packed, tmp_path):
    out, said = packed
    assert unpack(out, tmp_path) == {name: value for name, value in said.items() if name != "mib"}
    table = pd.read_csv(tmp_path / "patches/patches.csv")
    whole = pd.read_csv(small_run / "patches/patches.csv")
    pd.testing.assert_frame_equal(table, whole[whole["split"] != "test"].reset_index(drop=True))
    for patch in table["patch"]:
        assert (tmp_path / "patches" / patch).read_bytes() == (small_run / "patches" / patch).read_bytes()
    fields = pd.read_csv(tmp_path / "fields/fields.csv")
    before = pd.read_csv(small_run / "patches/fields.csv").set_index("image")["path"]
    assert set(fields["split"]) == {"val", "test"} and said["fields_left_out"] == 0
    for field in fields.itertuples():
        own = read_field(small_run / "sample" / before[field.image])
        assert (read_field(tmp_path / "fields" / field.path) == own).all()


def test_what_is_too_large_or_no_packed_file_is_one_line(small_run, packed, tmp_path):
    with pytest.raises(InputError, match=r"MiB of patches, more than 0\.1"):
        pack(small_run / "patches", tmp_path / "a.zip", "", 0.1)
    sizes = [info.file_size for info in zipfile.ZipFile(packed[0]).infolist() if info.filename.startswith("patches/")]
    few = pack(small_run / "patches", tmp_path / "a.zip", "", sum(sizes) / 2**20 + 0.1)
    assert few["fields_left_out"] > 0
    (tmp_path / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"b\.zip: no file of"):
        unpack(tmp_path / "b.zip", tmp_path / "b")


def test_judged_results_are_taken_over_into_the_table(tmp_path):
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = tmp_path / "results.csv"
    shutil.copy(ROOT / "docs/results.csv", table)
    before = table.read_bytes()
    metrics = {"tp": 6, "fp": 2, "fn": 2, "precision": 0.75, "recall": 0.75, "f1": 0.75, "f1_low": 0.5, "f1_high": 0.9}
    metrics |= {"average_precision": 0.70049, "oracle_f1": 0.8}
    facts = {"date": "2030-01-02", "commit": "0123456", "weights": "resnet18, paper", "arm": "stage 2", "seed": 0}
    row = row_of(metrics, {"source": "mitos14", "test_cases": ["H05"]}, {**facts, "note": "a GPU"})
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({"quick": False, "rows": [row]}))
    assert script.take_over(results, table) == 1 and script.take_over(results, table) == 0  # once is enough
    assert table.read_bytes().startswith(before)
    document = script.results(script.read(table), pd.read_csv(ROOT / "docs/votes.csv"))
    assert "| 1 | mitos14 H05 | stage 2 | 0 | 0.750 (0.500-0.900) | 0.750 | 0.750 | 6 2 2 | 0.700 | 0.800 |" in document
    results.write_text(json.dumps({"quick": True, "rows": [row]}))
    with pytest.raises(SystemExit, match="--quick"):
        script.take_over(results, table)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_the_gpu_does_what_the_cpu_does(name, small_run, tmp_path):
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    field = read_field(gpu.EXAMPLE)
    CHECKS[name](Case(field, gpu.UM_PER_PX, torch.device("cuda"), tmp_path))
