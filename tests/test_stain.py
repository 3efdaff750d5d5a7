"""Two stains of one field come out alike; what is no H&E is said and counted all the same."""

import time

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pipeline import ROOT, succeed
from recoloured import recoloured

from dasc.detect.image import shrink
from dasc.images.read import read_field
from dasc.images.stain import DENSITY, MEAN, SPREAD, normalise_stain
from dasc.images.stain_check import MEANS, SPREADS, check_stain
from dasc.images.tissue import UM_PER_PX, find_tissue

REAL = sorted((ROOT / "docs/example").glob("*.jpg"))  # two fields of 0.25 um/px
SHARED = sorted((ROOT.parent / "shared/data").glob("mitos14/H*/frames/x40/*_00Aa.jpg"))
SAID = {
    "as it is": {"H&E"},
    "gray": {"gray"},
    "inverted": {"dark background", "not H&E"},
    "fluorescence": {"dark background"},
    **{f"channels {order}": {"not H&E"} for order in ("bgr", "grb", "gbr", "rbg", "brg")},
    **{f"DAB on {share}": {"not H&E"} for share in ("50%", "10%")},
}


def field(factors, offset=0.0) -> np.ndarray:
    """A random field whose optical densities are multiplied and moved."""
    rng = np.random.default_rng(0)
    density = rng.gamma(4.0, [0.06, 0.15, 0.08], size=(240, 320, 3)) * factors + offset
    return np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def test_mean_and_spread_of_the_tissue_are_the_common_ones():
    density = DENSITY[normalise_stain(np.repeat(np.repeat(field(1.0), 8, 0), 8, 1))].reshape(-1, 3)
    assert np.abs(density.mean(axis=0) - MEAN).max() < 0.05
    assert np.abs(density.std(axis=0) - SPREAD).max() < 0.05


@pytest.mark.parametrize("factors", [0.6, (1.4, 0.8, 1.2)])
def test_another_stain_comes_out_alike(factors):
    first, second = (np.repeat(np.repeat(field(factor), 8, 0), 8, 1) for factor in (1.0, factors))
    apart = [np.abs(a.astype(int) - b).mean() for a, b in ((first, second), map(normalise_stain, (first, second)))]
    assert apart[1] < apart[0] / 4


def test_fields_without_tissue_stay():
    for image in (np.full((400, 400, 3), 245, np.uint8), np.full((400, 400, 3), 90, np.uint8), field(1.0)[:3, :3]):
        assert normalise_stain(image) is image


def small(image: np.ndarray, um_per_px: float = 0.25) -> np.ndarray:
    """The image at the resolution at which its stain is checked."""
    return shrink(image, image.shape[1] * um_per_px, image.shape[0] * um_per_px)


def at(path, um_per_px: float) -> np.ndarray:
    scale = 0.25 / um_per_px
    return cv2.resize(read_field(path), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_fields_are_he_and_the_same_recoloured_are_not(path):
    found = {name: check_stain(small(image, 1.0)) for name, image in recoloured(at(path, 1.0))}
    assert found.keys() == SAID.keys()
    for name, stain in found.items():
        assert stain.name in SAID[name], (name, stain)
        assert bool(stain.note) == (name != "as it is")


@pytest.mark.skipif(not SHARED, reason="needs the fields of MITOS-ATYPIA-14")
def test_fields_of_every_slide_are_he_and_it_is_quick():
    for path in SHARED:
        image = small(read_field(path), 0.2274)
        begun = time.perf_counter()
        stain = check_stain(image)
        find_tissue(image, UM_PER_PX)
        assert stain.name == "H&E" and time.perf_counter() - begun < 0.1, path


@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_a_stain_far_from_all_that_was_seen_is_said(factor):
    """Paler or darker than any real field, in the colours of H&E: the note names found and expected."""
    image = small(read_field(REAL[1]))
    density = DENSITY[image] * factor
    stain = check_stain(np.clip(256 * np.exp(-density) - 1, 0, 255).round().astype(np.uint8))
    assert stain.name == "far from the training's stain"
    assert "expected" in stain.note and "optical density" in stain.note
    assert all(low < high for low, high in (*MEANS.values(), *SPREADS.values()))


def test_only_the_tissue_of_a_slide_is_looked_at():
    tissue = small(read_field(REAL[1]))
    image = np.concatenate([tissue, np.full_like(tissue, (30, 90, 40))])
    mask = np.repeat([True, False], len(tissue))[:, None].repeat(tissue.shape[1], 1)
    assert check_stain(image).name != "H&E" and check_stain(image, mask).name == "H&E"


@pytest.mark.parametrize("colour", [(245, 245, 245), (255, 255, 255)])
def test_glass_alone_is_no_other_stain(colour):
    stain = check_stain(np.full((60, 60, 3), colour, np.uint8))
    assert stain == ("too little tissue to tell", "")


def test_what_is_no_he_is_counted_and_said(small_run, tmp_path):
    """On the screen, in counts.csv and in the report, first and beside the image; the exit status stays 0."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in recoloured(at(REAL[1], 0.5)):
        if name in ("as it is", "gray", "inverted", "channels bgr", "DAB on 50%", "fluorescence"):
            Image.fromarray(image).save(folder / f"{name}.png")
    flags = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1, "--threshold", 0.3]
    flags += ["--um_per_px", 0.5, "--overlays", "False", "--thumbnails", 1]
    done = succeed("predict.py", *flags, "--images", folder, "--out", tmp_path / "out")
    counts = pd.read_csv(tmp_path / "out/counts.csv", keep_default_na=False).set_index("image")
    detections = pd.read_csv(tmp_path / "out/detections.csv")
    assert len(counts) == 6 and counts["mitoses"].sum() == detections["mitosis"].sum() > 0
    assert counts.loc["gray.png", "mitoses"] > 0  # not suppressed
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    first = page[page.index('id="warnings"') : page.index('id="images"')]
    for name, row in counts.iterrows():
        assert row["stain"] in SAID[name.removesuffix(".png")], name
        beside = page[page.index(f"{name}</h2>") :].split("<figure>")[0]
        if name == "as it is.png":
            assert not row["stain_note"] and name not in first and "warning" not in beside
        else:
            assert f"{name}: {row['stain_note']}" in done.out
            assert name in first and 'class="warning' in beside and "H&amp;E" in beside
