"""Several processes that train as one, on the CPU: the tables of one process, and a line for every process that fails.

A training amplifies rounding: one process on two cores differs from one on one core in the third digit of the loss. So
what several processes compute is compared in double precision, where they agree to the last digit of every table.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from moments import Moment, end_child, run_child, start_child
from pipeline import LIGHT, ROOT, fails, last_of_each, succeed
from test_kill_resume import names

import dasc.model.augment
import dasc.model.step
import dasc.model.views
import dasc.model.watch
from dasc.model.augment import training_view
from dasc.model.draws import PartDraws
from dasc.model.views import strong_view, weak_view
from dasc.model.watch import AHEAD, BEAT_S, BEHIND_S, LEFT, LINGER_S, SILENT_S, Signs
from dasc.run import TORCHRUN

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks, and SIGKILL")
PATCHES = ["--manifest", "data/patches_ns/patches.csv"]
FEW = ["--manifest", "few/patches.csv", "--batch_size", 16]
SMALL = [*LIGHT, "--backbone", "mobilenetv3_small_050", "--stride", 8]
SCAN = ["--views", 1, "--per_mm2", 1000]
TRAININGS = {  # flags, number of processes, tables
    "NS/sigle.py": ([*FEW, *SCAN, "--epochs", 1], 3, ["log.csv", "val_curve.csv"]),
    "DMU/main.py": ([*FEW, "--epochs", 2], 2, ["log.csv", "memory.csv"]),
    # batch norms of torch; those of MobileNet are timm's, with an activation
    "DMU/hard_main.py": ([*PATCHES, "--epochs", 1, "--backbone", "resnet10t"], 2, ["log.csv", "checked.csv"]),
    "DMU/hard_scl_main.py": (
        [*PATCHES, *SCAN, "--epochs", 2, "--contrast_labels_share", 0.5, "--subclasses", 2],
        2,
        ["log.csv", "subclasses.csv", "val_curve.csv"],
    ),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*TORCHRUN, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def in_double():
    """In the child: what is float32 elsewhere is float64."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    single = torch.tensor
    torch.tensor = lambda *args, **options: wide(single(*args, **options))
    dasc.model.augment.STAINS, dasc.model.views.YIQ = wide(dasc.model.augment.STAINS), wide(dasc.model.views.YIQ)


def wide(tensor):
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def impatient():
    """In the child: what takes a minute takes seconds."""
    watch = dasc.model.watch
    watch.BEAT_S, watch.SILENT_S, watch.BROKEN_S, watch.BEHIND_S, watch.LINGER_S = 0.2, 3.0, 1.0, 4.0, 1.0


def ranked(rank: int, size: int, port: int, prepare):
    """In the child: the environment as torchrun sets it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for each in prepare:
        each()


def started(folder, size, script, *flags, prepare=(), only=None, moments=None):
    """Processes of one training and their logs. only: flags or preparations of some ranks. moments: by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs, children = [folder / f"{rank}.log" for rank in range(size)], []
    for rank, log in enumerate(logs):
        more = (only or {}).get(rank, [])
        prepared = [*prepare, *(one for one in more if callable(one))]
        given = [*flags, *(one for one in more if not callable(one))]
        ready = functools.partial(ranked, rank, size, port, prepared)
        children.append(start_child(log, script, *given, prepare=ready, moment=(moments or {}).get(rank)))
    return children, logs


def ended(children, logs):
    return [end_child(child, log) for child, log in zip(children, logs, strict=True)]


def lines(run):
    """What a run printed, without its progress bars and what gloo says of torch 2.10."""
    said = run.said.replace("\r", "\n").splitlines()
    return [line for line in said if line.strip() and "%|" not in line and not line.startswith("[Gloo]")]


@pytest.fixture
def here(readme_run, tmp_path, monkeypatch):
    """A folder with the results of the README's commands, in which to train; few/ holds a part of the patches."""
    for name in ("data", "results"):
        (tmp_path / name).symlink_to(readme_run / name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree("data/patches_ns", "few")
    head, *rows = Path("few/patches.csv").read_text().splitlines(keepends=True)
    few = [row for number, row in enumerate(rows) if "annotated" in row or ("shifted" not in row and number % 3 == 0)]
    Path("few/patches.csv").write_text(head + "".join(few))
    return tmp_path


def batch_with_two_left() -> int:
    """A batch size that leaves the last batch of stage 2 two patches: fewer than three processes."""
    table = pd.read_csv("few/patches.csv")
    drawn = (table["split"] == "train").sum() // 2 * 2
    return next(size for size in range(20, 200) if drawn % size == 2)


@pytest.mark.parametrize("script", [script for script in TRAININGS if script != "DMU/main.py"])
def test_several_processes_are_one(here, script):
    flags, size, _ = TRAININGS[script]
    flags = [*SMALL, *flags] + (["--batch_size", batch_with_two_left()] if script == "NS/sigle.py" else [])
    one = run_child(here / "log", script, *flags, "--out", "one", prepare=in_double)
    assert one.status == 0, one.said
    several = ended(*started(here, size, script, *flags, "--out", "out", prepare=[in_double]))
    check_same_training(here, script, several, one)


def check_same_training(here, script, several, one):
    first, *others = several
    assert first.status == 0 and lines(first)[:-1] == lines(one)[:-1], first.said
    assert [(run.status, lines(run)) for run in others] == [(0, [])] * len(others)
    assert not [what for run in others for what in run.happened if what.startswith("writing")]
    assert names(here / "out") == names(here / "one")
    for table in TRAININGS[script][2]:
        pd.testing.assert_frame_equal(*(pd.read_csv(here / out / table) for out in ("out", "one")), rtol=0, atol=2e-6)
    last, alone = (torch.load(here / out / "last.pt", weights_only=True)["model"] for out in ("out", "one"))
    assert list(last) == list(alone) and all(torch.allclose(last[name], alone[name], atol=1e-8) for name in last)


def test_killed_and_gone_on_with_by_another_number(here):
    """Rank 0 of two is killed in the second epoch, so that the other one ends and says so; three processes go on."""
    flags = ["DMU/main.py", *SMALL, *TRAININGS["DMU/main.py"][0], "--out"]
    one = run_child(here / "log", *flags, "one", prepare=in_double)
    assert one.status == 0, one.said
    killed = {0: Moment("step", one.happened.count("step") // 2 + 2, 0.0)}
    first, other = ended(*started(here, 2, *flags, "out", prepare=[in_double], moments=killed))
    assert (first.status, other.status) == (-signal.SIGKILL, 1), other.said
    assert lines(other)[-1].startswith("error: rank 0, or the torchrun that started it, has ended"), other.said
    several = ended(*started(here, 3, *flags, "out", "--resume", prepare=[in_double]))
    assert several[0].happened.count("step") == one.happened.count("step") // 2
    check_same_training(here, "DMU/main.py", several, one)


def test_torchrun_starts_them(here):
    """In single precision, with steps too small to amplify its rounding."""
    flags = last_of_each([*map(str, [*SMALL, *FEW, "--epochs", 1, "--lr", 1e-6])])
    succeed("DMU/main.py", *flags, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, ROOT / "DMU/main.py", *flags, "--out", "two"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("wrote two/memory.csv") == 1
    runs = [json.loads((here / out / "run.json").read_text(encoding="utf-8")) for out in ("two", "one")]
    assert [run["processes"] for run in runs] == [2, 1]
    for table in ("log.csv", "memory.csv"):
        pd.testing.assert_frame_equal(*(pd.read_csv(here / out / table) for out in ("two", "one")), atol=1e-3)
    assert not list(here.glob(".*.lock"))


def sleeps_in_step_5():
    whole, steps = dasc.model.step.Step.__call__, []

    def call(*args):
        steps.append(1)
        if len(steps) == 5:
            time.sleep(100)
        return whole(*args)

    dasc.model.step.Step.__call__ = call


def stage_2(size: int, *flags, **options):
    """Impatient processes of stage 2, and their logs."""
    given = [*LIGHT, *FEW, "--out", "out", *flags]
    return started(Path.cwd(), size, "NS/sigle.py", *given, prepare=[impatient], **options)


def test_a_process_that_dies_is_named(here):
    first, other = ended(*stage_2(2, moments={1: Moment("step", 5, 0.0)}))
    assert (first.status, other.status) == (1, -signal.SIGKILL)
    assert lines(first)[-1].startswith("error: rank 1 has died or hangs: no sign of life"), first.said


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stands_still_is_named(here, stopped):
    children, logs = stage_2(2, "--epochs", 1000)
    while not (here / "out/last.pt").is_file():
        time.sleep(0.05)
    os.kill(children[stopped].pid, signal.SIGSTOP)
    run = end_child(children[1 - stopped], logs[1 - stopped])
    os.kill(children[stopped].pid, signal.SIGKILL)
    assert end_child(children[stopped], logs[stopped]).status == -signal.SIGKILL
    says = "rank 1 has died or hangs" if stopped else "rank 0, or the torchrun that started it, has died or hangs"
    assert run.status == 1 and lines(run)[-1].startswith(f"error: {says}"), run.said


def test_a_process_whose_work_stands_still_is_named(here):
    for run in ended(*stage_2(2, only={1: [sleeps_in_step_5]})):
        assert run.status == 1, run.said
        assert lines(run)[-1].startswith("error: rank 1 hangs: the others have waited for it"), run.said


def test_what_counts_as_dead_or_hanging():
    """The limits keep the promise of a minute, and no process is blamed that may take its time."""
    assert max(SILENT_S, BEHIND_S) + 2 * BEAT_S + 2 * LINGER_S < 60
    signs = Signs(0, 3, 0.0)

    def see(now, *counts):
        for rank, (beats, exchanges) in enumerate(counts):
            signs.see(rank, beats, exchanges, now)
        return signs.fault(now, SILENT_S)

    assert not see(1, (1, 0), (1, 0), (1, 0))
    assert not see(100, (2, 1), (2, 0), (2, 1))  # rank 1 still reads its patches
    assert not see(200, (3, 7), (3, 6), (3, 7))
    assert not see(200 + BEHIND_S, (4, 7), (4, 6), (4, 7))
    assert see(201 + BEHIND_S, (5, 7), (5, 6), (5, 7)).startswith("rank 1 hangs: the others have waited for it for 41")
    assert not see(300, (6, 8), (6, 8), (6, 8))
    assert not see(400, (7, 8 + AHEAD), (7, 9), (7, 9))  # rank 0 writes, and the others wait
    assert not see(400 + SILENT_S, (8, 9), (8 + LEFT, 9), (7, 9))
    assert see(401 + SILENT_S, (9, 9), (8 + LEFT, 9), (7, 9)).startswith("rank 2 has died or hangs: no sign of life")


def test_processes_that_differ_are_told_apart(here):
    shutil.copytree("few", "other")
    rows = Path("other/patches.csv").read_text().splitlines()
    Path("other/patches.csv").write_text("\n".join(rows[:-1]) + "\n")
    other = ["--manifest", "other/patches.csv", "--seed", 3]
    runs = ended(*stage_2(3, only={2: other}))
    said = [line for run in runs for line in lines(run) if line.startswith("error")]  # torch may say more
    assert [run.status for run in runs] == [1, 1, 1] and said
    differs = "error: rank 2 is not like rank 0: --manifest is another file; seed 3, not 0;"
    assert all(line.startswith(differs) for line in said), said
    assert not (here / "out").exists()


def test_a_fault_of_one_process_or_of_all_is_told(here):
    runs = ended(*stage_2(2, only={1: ["--manifest", "gone.csv"]}))
    assert [run.status for run in runs] == [1, 1]
    assert all("error: rank 1: gone.csv: no such file" in lines(run)[-1] for run in runs), runs
    runs = ended(*stage_2(3, "--batch_size", 2))
    said = [line for run in runs for line in lines(run) if line.startswith("error")]  # torch may say more
    assert [run.status for run in runs] == [1, 1, 1] and said
    assert all("--batch_size 2: 3 processes share a batch; expected a patch for each at" in line for line in said), said


def test_variables_that_make_no_processes(monkeypatch, tmp_path):
    for script in TRAININGS:
        monkeypatch.setenv("RANK", "1")
        done = fails(script, "--out", tmp_path / "out", says="WORLD_SIZE: not set, although RANK is")
        assert done.status == 1 and done.err.count("\n") == 1 and "--shard" not in done.err
        monkeypatch.setenv("WORLD_SIZE", "1")
        fails(script, "--out", tmp_path / "out", says="RANK 1: expected 0 to 0 by WORLD_SIZE 1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        fails(script, "--out", tmp_path / "out", says="MASTER_ADDR '' and MASTER_PORT '': expected where rank 1")
        monkeypatch.delenv("WORLD_SIZE")
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_come_are_waited_for_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr("dasc.model.processes.JOIN_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {**place, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = fails("NS/sigle.py", "--out", tmp_path / "out", says="rank 0: 2 processes have not met at 127.0.0.1:")
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_every_part_draws_what_the_whole_does():
    patches = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8)
    for view in (weak_view, strong_view, lambda shown, draws: training_view(shown, draws, 0.2, 0.2, 0.8)):
        generator = torch.Generator().manual_seed(5)
        whole, state = view(patches, generator), generator.get_state()
        for part in (slice(0, 6), slice(6, 13), slice(6, 6)):
            generator, here = torch.Generator().manual_seed(5), torch.zeros(13, dtype=torch.bool)
            here[part] = True
            assert torch.allclose(view(patches[part], PartDraws(generator, here)), whole[part], atol=1e-6)
            assert torch.equal(generator.get_state(), state)
