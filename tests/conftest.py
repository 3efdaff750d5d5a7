"""Puts the project's root on sys.path, so that tests import dasc as the scripts do."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on small tensors more threads wait for each other

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from pipeline import LIGHT, succeed


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Stages 0, 1 and 2 on a small synthetic sample: sample/, patches/ and NS/ in one folder, not to be changed."""
    folder = tmp_path_factory.mktemp("small_run")
    succeed("pre/make_sample.py", "--out", folder / "sample", "--size_px", 700, "--mitoses", 4, "--imposters", 6)
    succeed("pre/cut_patch_2.py", *sample_flags(folder), "--out", folder / "patches")
    succeed("NS/sigle.py", *LIGHT, "--manifest", folder / "patches/patches.csv", "--out", folder / "NS", "--epochs", 2)
    return folder


def sample_flags(folder: Path) -> list[object]:
    return ["--dataset", "sample", "--data_root", folder / "sample", "--patch_size", 64, "--random_per_field", 20]
