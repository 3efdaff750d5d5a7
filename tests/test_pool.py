"""The pool: what is read, features computed once, and kept through what may happen to a run."""

import os

import numpy as np
import pytest
import torch

import dasc.weak.pool
from dasc.data.patches import write_patch
from dasc.errors import InputError
from dasc.model.inference import embed_patches
from dasc.model.network import CamNetwork
from dasc.weak.pool import PoolFeatures, read_pool

WIDTH = 512  # channels of the network below at stride 32


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CamNetwork("resnet10t", 32).eval()


def fill(folder, numbers, size=32):
    for number in numbers:
        patch = np.random.default_rng(number).integers(0, 255, size=(3, size, size)).astype(np.uint8)
        write_patch(folder / f"S{number % 3}_{number}-0.png", patch)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pool").mkdir()
    fill(tmp_path / "pool", range(10))
    return tmp_path / "pool"


def embed(network, folder, batch=4, sizes=(32, 32)):
    """The features of a folder, and how many patches the network was shown."""
    seen = []
    features = PoolFeatures(folder.parent / "features", "a" * 64, WIDTH)
    whole = dasc.weak.pool.embed_patches
    dasc.weak.pool.embed_patches = lambda net, patches, batch_size: (
        seen.append(len(patches)) or whole(net, patches, batch_size)
    )
    try:
        _, table = read_pool(folder, False)
        features.embed(network, folder, table["patch"].tolist(), sizes, batch, 2)
    finally:
        dasc.weak.pool.embed_patches = whole
    return features, table, sum(seen)


def check(features, table, folder, network):
    """The features of every patch are those of the patch alone."""
    got = features.at(features.rows)
    for index, patch in enumerate(table["patch"]):
        image = dasc.weak.pool.read_square(folder / patch, 32, 32)
        alone, score = embed_patches(network, torch.from_numpy(image).permute(2, 0, 1)[None], 1)
        assert got[index] == pytest.approx(alone[0], rel=2e-3, abs=2e-3)
        assert features.scores(features.rows[index : index + 1]) == pytest.approx(score, abs=1e-5)
    assert len(set(features.rows.tolist())) == len(table)


def test_an_embedding_is_the_mean_of_the_map(network):
    patches = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8)
    features, scores = embed_patches(network, patches, 4)
    with torch.no_grad():
        maps = network.features(patches.float() / 255)
        assert features == pytest.approx(maps.mean(dim=(2, 3)).numpy(), abs=1e-5)
        assert scores == pytest.approx(network(patches.float() / 255).softmax(dim=1)[:, 1].numpy(), abs=1e-6)


def test_computed_once(network, folder):
    features, table, seen = embed(network, folder)
    assert seen == 10 and len(features) == 10
    check(features, table, folder, network)
    assert (features.read(2, 5) == features.at(np.array([2, 3, 4]))).all()
    again, table, seen = embed(network, folder)
    assert seen == 0 and (again.rows == features.rows).all()


def test_new_and_changed_patches_are_added(network, folder):
    embed(network, folder)
    fill(folder, range(10, 13))
    (folder / "S0_0-0.png").unlink()
    fill(folder, [1])
    os.utime(folder / "S1_1-0.png", (1, 1))
    features, table, seen = embed(network, folder)
    assert seen == 4 and len(features) == 14 and len(table) == 12
    check(features, table, folder, network)


def test_broken_patch_is_named_and_nothing_is_lost(network, folder):
    whole = (folder / "S2_8-0.png").read_bytes()
    (folder / "S2_8-0.png").write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"S2_8-0\.png.*take it out of the pool"):
        embed(network, folder)
    kept = len(PoolFeatures(folder.parent / "features", "a" * 64, WIDTH))
    assert kept == 8  # two batches of four; the third holds the broken one
    (folder / "S2_8-0.png").unlink()
    features, table, seen = embed(network, folder)
    assert seen == 1 and len(table) == 9
    check(features, table, folder, network)


def test_a_killed_runs_half_record(network, folder):
    features, _, _ = embed(network, folder)
    with features.path.open("r+b") as file:
        file.truncate(7 * features.type.itemsize + 11)
    features, table, seen = embed(network, folder)
    assert seen == 3
    check(features, table, folder, network)


def test_another_size_is_refused(network, folder):
    fill(folder, [20], size=40)
    with pytest.raises(InputError, match="40 x 40 px, expected 32 x 32"):
        embed(network, folder)


def test_another_network_has_a_file_of_its_own(tmp_path):
    one, other = (PoolFeatures(tmp_path, letter * 64, WIDTH).path for letter in "ab")
    assert one != other


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_folder_of_names(tmp_path):
    (tmp_path / "below").mkdir()
    fill(tmp_path / "below", [4])
    for name in ("neg_A_1_5-7.png", "pos_B_5-7.png"):
        write_patch(tmp_path / name, np.zeros((3, 8, 8), np.uint8))
    folder, table = read_pool(tmp_path, False)
    assert folder == tmp_path
    assert table["patch"].tolist() == ["below/S1_4-0.png", "neg_A_1_5-7.png", "pos_B_5-7.png"]
    assert table["case"].tolist() == ["S1", "A_1", "B"]


def test_a_patches_csv_without_its_positives(tmp_path):
    path = write(tmp_path / "p.csv", "patch,case,label,x_px\na.png,007,0,5\nb.png,NA,1,6\nc.png,NA,0,\n")
    _, table = read_pool(path, False)
    assert table["patch"].tolist() == ["a.png", "c.png"] and table["case"].tolist() == ["007", "NA"]
    assert table["x_px"].tolist()[0] == 5 and np.isnan(table["x_px"][1]) and table["image"].tolist() == ["007", "NA"]


WRONG = {
    "no rows": ("patch,case\n", "the pool is empty"),
    "only positives": ("patch,case,label\na.png,1,1\n", "the pool is empty"),
    "twice": ("patch,case\na.png,1\na.png,1\n", "stands in it twice"),
    "escapes": ("patch,case\n../a.png,1\n", "leaves the folder"),
    "no column": ("patch\na.png\n", "column case is missing"),
    "no slide": ("patch,case\na.png,\nb.png,1\n", "1 of 2 pool patches state no slide"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_manifest(tmp_path, name):
    text, says = WRONG[name]
    with pytest.raises(InputError, match=says):
        read_pool(write(tmp_path / "p.csv", text), False)


def test_names_without_a_slide(tmp_path):
    write_patch(tmp_path / "example_1.png", np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(InputError, match="--unknown_slides True"):
        read_pool(tmp_path, False)
    assert read_pool(tmp_path, True)[1]["case"].tolist() == [""]


def test_no_pool(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_pool(tmp_path / "gone", False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        read_pool(tmp_path / "empty", False)
