"""Several runs that share the images of one folder, and the run that merges them: the same files as of one run."""

import argparse
import functools
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import tifffile
import torch
from moments import Moment, end_child, run_child, start_child
from pipeline import call, fails, succeed
from test_kill_resume import check_same, names

from dasc.errors import InputError
from dasc.flags import Shard
from dasc.images.parts import content_bytes
from dasc.report.shards import deal
from dasc.run import SLURM_ARRAY, TORCHRUN, only_run, pick_device, pick_shard

forks = pytest.mark.skipif(os.name == "nt", reason="forks, and SIGKILL")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*TORCHRUN, *SLURM_ARRAY, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def settings(small_run):
    return ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--threshold", 0.3, "--views", 1]


def launched(**variables):
    """In the child: the environment as a launcher sets it."""
    os.environ.update(variables)


def page(folder):
    """report.html without its last section, which tells when the run was."""
    return (folder / "report.html").read_text(encoding="utf-8").partition("<h2>Settings and versions")[0]


@pytest.fixture(scope="module")
def judged(small_run, tmp_path_factory):
    """Flags of six annotated fields, and what one run writes of them."""
    out = tmp_path_factory.mktemp("judged") / "whole"
    flags = [*settings(small_run), "--dataset", "sample", "--data_root", small_run / "sample", "--split", "train"]
    flags += ["--export", "asap", "coco"]
    succeed("predict.py", *flags, "--out", out)
    return flags, out


@forks
def test_three_shards_at_once_and_a_merge_are_one_run(judged, tmp_path):
    flags, whole = judged
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    children = []
    for rank, log in enumerate(logs):
        ranked = functools.partial(launched, RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
        children.append(start_child(log, "predict.py", *flags, "--out", tmp_path / "out", prepare=ranked))
    for rank, (child, log) in enumerate(zip(children, logs, strict=True)):
        run = end_child(child, log)
        assert run.status == 0 and f"shard {rank + 1}/3, by RANK" in run.said, run.said
        assert run.happened.count("field") == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".lock"]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == set()
    done = succeed("predict.py", *flags, "--out", tmp_path / "out", "--resume")
    assert "scanned now" not in done.out
    check_same(tmp_path / "out", whole, names(whole))
    assert page(tmp_path / "out") == page(whole)
    assert set(json.loads((tmp_path / "out/run.json").read_text())["shards"]) == {"1/3", "2/3", "3/3"}


@forks
def test_a_killed_shard_is_gone_on_with_or_its_images_are_scanned_by_the_merge(judged, tmp_path, request):
    flags, whole = judged
    rng = random.Random(request.config.getoption("--seed"))
    out, moment = tmp_path / "out", Moment("writing scan.json", 3, rng.random())
    run = run_child(tmp_path / "log", "predict.py", *flags, "--shard", "1/2", "--out", out, moment=moment)
    assert run.status == -signal.SIGKILL, run.said
    assert (tmp_path / ".out.1_of_2.lock").is_file()
    shutil.copytree(out, tmp_path / "merged")
    done = succeed("predict.py", *flags, "--out", tmp_path / "merged", "--resume")
    assert "shard 1/2 did not come to its end: 1 of its 3 images are scanned now" in done.out
    assert "shard 2/2 left no record: 3 of its 3 images are scanned now" in done.out
    check_same(tmp_path / "merged", whole, names(whole))

    succeed("predict.py", *flags, "--shard", "2/2", "--out", out)
    resumed = succeed("predict.py", *flags, "--shard", "1/2", "--out", out, "--resume")
    assert "shard 1/2: 3 of 6 images" in resumed.out and not (tmp_path / ".out.1_of_2.lock").exists()
    assert "scanned now" not in succeed("predict.py", *flags, "--out", out, "--resume").out
    check_same(out, whole, names(whole))


@pytest.fixture
def blank(small_run, tmp_path):
    """Flags of three small images without a cell, and of a folder OUT."""
    (tmp_path / "images").mkdir()
    for size in (40, 60, 80):
        tifffile.imwrite(tmp_path / f"images/{size}.tiff", np.full((size, size, 3), 250, np.uint8))
    flags = [*settings(small_run), "--images", tmp_path / "images", "--um_per_px", 0.25, "--overlays", "False"]
    return [*flags, "--report", "False", "--out", tmp_path / "out"]


def test_what_a_shard_skips_the_merge_names_and_counts(blank, tmp_path):
    """The exit status of a shard stays 0, so that torchrun does not end the others."""
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    (tmp_path / "images/export.zarr").mkdir()
    for shard in ("1/2", "2/2"):
        succeed("predict.py", *blank, "--shard", shard)
    done = call("predict.py", *blank, "--resume")
    assert done.status == 1 and "2 images skipped" in done.out and "scanned now" not in done.out
    assert "broken.png: skipped" in done.out and "export.zarr: skipped" in done.out


def test_a_shard_without_images_succeeds_and_says_so(blank, tmp_path):
    done = succeed("predict.py", *blank, "--shard", "5/5")
    assert "shard 5/5: none of 3 images" in done.out
    done = succeed("predict.py", *blank, "--resume")
    assert [line for line in done.out.splitlines() if "scanned now" in line] == [
        f"shard {number}/5 left no record: 1 of its 1 images are scanned now" for number in (1, 2, 3)
    ]
    assert not (tmp_path / "out/shards").exists()


def test_shards_that_do_not_go_together_are_refused_in_one_line(blank, tmp_path):
    succeed("predict.py", *blank, "--shard", "1/3")
    record = tmp_path / "out/shards/1_of_3.json"
    before = record.read_bytes()
    others = [
        (["--shard", "2/3", "--threshold", 0.4], "shard 1/3 ran with threshold 0.3, not 0.4"),
        (["--resume", "--smallest", 0.2], "shard 1/3 ran with smallest 0.05, not 0.2"),
        (["--shard", "1/3", "--resume", "--views", 2], "shard 1/3 ran with views 1, not 2"),
        (["--shard", "2/4"], "holds shard 1/3, expected shards of 4"),
        ([], "--resume merges it"),
    ]
    for flags, says in others:
        fails("predict.py", *blank, *flags, says=says)
    (tmp_path / "images/40.tiff").write_bytes((tmp_path / "images/60.tiff").read_bytes())
    for flags in (["--shard", "2/3"], ["--resume"]):
        fails("predict.py", *blank, *flags, says="shard 1/3 (3 images) saw another list of images than this run (3")
    for text in ("{", "[]", '{"shard": "1/3"}', before.decode().replace('"1/3"', '"2/3"')):
        record.write_text(text)
        fails("predict.py", *blank, "--resume", says="1_of_3.json: not the record of a shard")
    assert [path.name for path in (tmp_path / "out/shards").iterdir()] == ["1_of_3.json"]
    record.unlink()
    succeed("predict.py", *blank, "--resume")


def test_flags_and_variables_that_make_no_shard(monkeypatch, tmp_path, capsys):
    for text in ("4/3", "0/3", "a/b", "1", "1/3/5", "-1/3", "1/0"):
        done = fails("predict.py", f"--shard={text}", says="--shard: expected 1/3 for the first of three")
        assert done.status == 2
    with pytest.raises(argparse.ArgumentTypeError):
        Shard("3/2")
    monkeypatch.setenv("RANK", "1")
    done = fails("predict.py", "--out", tmp_path / "out", says="WORLD_SIZE: not set, although RANK is")
    assert done.status == 1 and done.err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert pick_shard(Shard("2/5")) == "2/5" and capsys.readouterr().out == "shard 2/5, by --shard\n"
    for rank, size, says in (("3", "3", "expected 0 to 2"), ("x", "3", "RANK: 'x'"), ("0", "-1", "WORLD_SIZE: '-1'")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match=says):
            pick_shard(Shard(""))


def array(monkeypatch, *values):
    for name, value in zip(SLURM_ARRAY, values, strict=True):
        monkeypatch.setenv(name, str(value))


def test_launchers_say_the_shard(monkeypatch, capsys):
    assert pick_shard(Shard("")) == "" and not capsys.readouterr().out
    array(monkeypatch, 12, 4, 10, 13)
    assert pick_shard(Shard("")) == "3/4" and capsys.readouterr().out == "shard 3/4, by SLURM_ARRAY_TASK_ID\n"
    for values in ((4, 4, 0, 6), (3, 2, 1, 3), (9, 4, 0, 3)):  # a step of 2, a list, a task of another array
        array(monkeypatch, *values)
        with pytest.raises(InputError, match="expected an array without gaps"):
            pick_shard(Shard(""))
    array(monkeypatch, 7, 1, 7, 7)
    assert pick_shard(Shard("")) == ""  # one run shares nothing
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = []
    for task in (1, 2):
        array(monkeypatch, task, 2, 1, 2)
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            found.append(pick_shard(Shard("")))
    assert found == [f"{number}/8" for number in range(1, 9)]
    assert "by SLURM_ARRAY_TASK_ID and RANK" in capsys.readouterr().out


def test_a_shard_takes_the_device_of_its_local_rank(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto", Shard("2/2")) == pick_device("cuda", Shard("2/2")) == torch.device("cuda:1")
    assert pick_device("auto", True) == torch.device("cuda:1")  # of a training by several processes
    assert pick_device("auto") == torch.device("cuda") and pick_device("cpu", Shard("2/2")) == torch.device("cpu")
    for local in ("2", "x"):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(InputError, match=f"LOCAL_RANK {local}: 2 CUDA devices are seen here"):
            pick_device("auto", Shard("2/2"))


def test_shards_share_a_folder_with_each_other_but_with_no_whole_run(monkeypatch, tmp_path):
    monkeypatch.setattr("dasc.run.DOOR_S", 0.2)
    out = tmp_path / "out"
    with only_run(out, "1/2"), only_run(out, "2/2"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1_of_2.lock", ".out.2_of_2.lock"]
        for shard in ("1/2", ""):
            with pytest.raises(InputError, match="another run writes here"), only_run(out, shard):
                pass
    with only_run(out), pytest.raises(InputError, match="another run writes here"), only_run(out, "1/2"):
        pass
    (tmp_path / ".out.1_of_2.lock").write_text("of a killed shard")
    with only_run(out):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())


def test_images_are_dealt_by_size():
    assert deal([1, 9, 3, 5, 4], 2) == [2, 1, 1, 2, 2]  # 9 and 3; 5, 4 and 1
    assert deal([0, 0, 0, 0], 2) == [1, 2, 1, 2] and deal([5], 3) == [1]
    rng = random.Random(0)
    for _ in range(50):
        sizes = [int(rng.lognormvariate(20, 1)) for _ in range(rng.randint(1, 60))]
        of = rng.randint(1, 8)
        dealt = deal(sizes, of)
        loads = [sum(size for size, its in zip(sizes, dealt, strict=True) if its == one) for one in range(1, of + 1)]
        assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes)


def test_the_size_of_a_slide_is_that_of_all_its_files(tmp_path):
    (tmp_path / "a.mrxs").write_bytes(bytes(10))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/Data0000.dat").write_bytes(bytes(200))
    assert content_bytes(tmp_path / "a.mrxs") == 210 and content_bytes(tmp_path / "gone.tif") == 0
