"""patches.npy gives what the PNG files give, whatever was done to either of them; the files are what counts."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import sample_flags
from pipeline import LIGHT, fails, succeed
from test_faults_disk import small_files

import dasc.data.patches
from dasc.data.pack import PACK, MappedPatches, open_patches, write_pack
from dasc.data.patches import load_patches, read_patch, write_patch
from dasc.data.tables import read_patches
from dasc.errors import InputError, WriteError
from dasc.model.transfer import gather, resident

CPU = torch.device("cpu")
NAMES = [f"train/{number} Größe \udcff.png" for number in range(9)]  # a byte that is not UTF-8


def write_folder(folder, seed=0, size=16):
    """Nine patches and their pack."""
    (folder / "train").mkdir(parents=True)
    for name, patch in zip(NAMES, np.random.default_rng(seed).integers(0, 255, (9, 3, size, size)), strict=True):
        write_patch(folder / name, patch.astype(np.uint8))
    write_pack(folder, NAMES, 2)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "patches")


def of_files(folder, names):
    return load_patches([folder / name for name in names], 1)


@pytest.fixture
def read(monkeypatch):
    """The names of the patches that are read from their files."""
    names, whole = [], dasc.data.patches.read_patch

    def told(path):
        names.append(f"{path.parent.name}/{path.name}")
        return whole(path)

    monkeypatch.setattr(dasc.data.patches, "read_patch", told)
    return names


@pytest.mark.parametrize("places", [range(9), [7, 2, 5]], ids=["all", "a subset in another order"])
def test_the_pack_gives_what_the_files_give(folder, read, capsys, places):
    names = [NAMES[place] for place in places]
    patches = open_patches(folder, names, 2, 16)
    assert isinstance(patches, MappedPatches) and not read and capsys.readouterr().out == ""
    expected, index = of_files(folder, names), torch.tensor([2, 0, 2])
    assert patches.shape == expected.shape and len(patches) == len(names) and patches.nbytes == expected.nbytes
    assert torch.equal(patches[index], expected[index]) and torch.equal(patches[index.numpy()], expected[index])
    assert torch.equal(patches[1:3], expected[1:3]) and torch.equal(torch.cat(list(patches.split(2))), expected)
    assert torch.equal(patches.to(CPU), expected) and resident(patches, CPU) is patches
    assert torch.equal(gather([patches, torch.arange(9)], index, CPU)[0], expected[index])


def test_numpy_maps_the_pack_in_the_order_of_the_manifest(folder):
    mapped = np.load(folder / PACK, mmap_mode="r")
    assert (np.asarray(mapped) == of_files(folder, NAMES).numpy()).all()


def test_the_mapped_memory_is_never_written(folder):
    before = (folder / PACK).read_bytes()
    patches = open_patches(folder, NAMES, 2, 16)
    patches[0:4].zero_()
    patches.to(CPU).zero_()
    assert (folder / PACK).read_bytes() == before and torch.equal(patches[0:9], of_files(folder, NAMES))


def test_patches_that_changed_or_came_later_are_read_from_their_files(folder, read, capsys):
    other = np.full((3, 16, 16), 7, np.uint8)
    names = [*NAMES, "train/new.png"]
    write_patch(folder / NAMES[4], other)
    write_patch(folder / names[-1], other)
    seconds = (folder / NAMES[6]).stat().st_mtime_ns // 10**9
    os.utime(folder / NAMES[6], (seconds, seconds))  # of the same size
    patches = open_patches(folder, names, 1, 16)
    assert set(read) == {NAMES[4], NAMES[6], names[-1]}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "3 of 10 patches are not in it or have changed since" in said
    assert "pre/split_patches.py" in said
    assert torch.equal(patches[0:10], of_files(folder, names)) and (patches[4:5] == 7).all()
    assert torch.equal(patches[torch.tensor([9, 0, 6])], of_files(folder, [names[9], names[0], names[6]]))


def test_a_deleted_patch_is_an_error_with_a_pack_too(folder):
    (folder / NAMES[5]).unlink()
    with pytest.raises(InputError, match=r"5 Größe .*cut the patches again"):
        open_patches(folder, NAMES, 2, 16)
    assert torch.equal(open_patches(folder, NAMES[:5], 2, 16)[0:5], of_files(folder, NAMES[:5]))


SPOILT = {
    "empty": lambda data: b"",
    "header alone": lambda data: data[:128],
    "half": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "without its lists": lambda data: data[: 128 + 9 * 3 * 16 * 16],
    "another file": lambda data: b"PK\3\4" + data,
    "another header": lambda data: data.replace(b"(9, 3, 16, 16)", b"(8, 3, 16, 18)", 1),
    "no header": lambda data: data.replace(b"(9, 3, 16, 16)", b"((((((((((((((", 1),
    "more than there is": lambda data: data.replace(b"(9, 3, 16, 16), }  ", b"(9000, 3, 16, 16), }", 1),
    "less than nothing": lambda data: data.replace(b"(9, 3, 16, 16), } ", b"(-9, 3, 16, 16), }", 1),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_pack_that_is_not_whole_is_said_and_the_files_are_read(folder, capsys, spoilt):
    data = (folder / PACK).read_bytes()
    (folder / PACK).write_bytes(SPOILT[spoilt](data))
    assert (folder / PACK).read_bytes() != data
    assert torch.equal(open_patches(folder, NAMES, 2, 16), of_files(folder, NAMES))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{folder / PACK}: no whole pack of patches of 16 px" in said


def test_a_pack_of_another_folder_is_said_and_the_files_are_read(folder, tmp_path, capsys):
    """Of the same names, and of patches of another size."""
    shutil.copy2(write_folder(tmp_path / "other", seed=1) / PACK, folder / PACK)
    assert torch.equal(open_patches(folder, NAMES, 2, 16)[0:9], of_files(folder, NAMES))
    assert "9 of 9 patches are not in it or have changed since" in capsys.readouterr().out
    shutil.copy2(write_folder(tmp_path / "larger", size=20) / PACK, folder / PACK)
    assert torch.equal(open_patches(folder, NAMES, 2, 16), of_files(folder, NAMES))
    assert "no whole pack of patches of 16 px" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_of_a_pack(folder):
    before = (folder / PACK).read_bytes()
    with small_files(3000), pytest.raises(WriteError, match="cannot be written"):
        write_pack(folder, NAMES, 2)
    assert (folder / PACK).read_bytes() == before
    assert [path.name for path in folder.iterdir() if path.is_file()] == [PACK]


def test_a_training_from_the_pack_gives_the_same_bytes(tmp_path):
    """Of patches copied by pre/split_patches.py, which packs them anew."""
    for number in range(24):
        path = tmp_path / f"named/{'neg' if number % 3 else 'pos'}_A{number // 4:05d}_{number}-7.png"
        path.parent.mkdir(exist_ok=True)
        write_patch(path, np.random.default_rng(number).integers(0, 255, (3, 40, 40)).astype(np.uint8))
    flags = ["--labelled", tmp_path / "named", "--patch_size", 32, "--pack", "False", "--out", tmp_path / "files"]
    succeed("pre/split_patches.py", *flags)
    succeed("pre/split_patches.py", "--labelled", tmp_path / "files/patches.csv", "--out", tmp_path / "packed")
    made = {}
    for name in ("files", "packed"):
        assert (tmp_path / name / PACK).exists() == (name == "packed")
        flags = [*LIGHT, "--manifest", tmp_path / name / "patches.csv", "--out", tmp_path / f"NS {name}"]
        said = succeed("NS/sigle.py", *flags, "--epochs", 1, "--batch_size", 8).out
        assert PACK not in said
        made[name] = [(tmp_path / f"NS {name}" / file).read_bytes() for file in ("model.pt", "log.csv", "test.json")]
    assert made["files"] == made["packed"]


def test_stage_1_packs_its_patches(small_run):
    names = read_patches(small_run / "patches/patches.csv")["patch"].tolist()
    mapped = np.load(small_run / "patches" / PACK, mmap_mode="r")
    assert len(mapped) == len(names) and isinstance(open_patches(small_run / "patches", names, 1, 64), MappedPatches)
    for row in range(0, len(names), 29):
        assert (mapped[row].transpose(1, 2, 0) == read_patch(small_run / "patches" / names[row])).all()


def test_a_disk_too_full_for_the_pack_loses_no_patch(small_run, tmp_path):
    """The cut patches wait beside, and --resume goes on with or without the pack."""
    flags = [*sample_flags(small_run), "--out", tmp_path / "out"]
    with small_files(300_000):
        fails("pre/cut_patch_2.py", *flags, says=f"{PACK}: cannot be written (File too large)")
    partial = tmp_path / "out.partial"
    cut = {path.relative_to(partial): path.stat().st_mtime_ns for path in partial.rglob("*.png")}
    (partial / f".{PACK}.tmp").write_bytes(b"what a killed run leaves")
    succeed("pre/cut_patch_2.py", *flags, "--resume", "True", "--pack", "False")
    out = tmp_path / "out"
    assert cut == {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("*.png")} and cut
    assert not [path for path in out.iterdir() if PACK in path.name]
