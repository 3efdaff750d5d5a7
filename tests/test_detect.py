"""Merging and scanning: the strongest stays, nothing is counted twice, places are the field's own pixels."""

import threading
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

import dasc.detect.candidates
import dasc.detect.field
from dasc.data.cut import ValFields
from dasc.detect.cutter import PatchCutter
from dasc.detect.field import merge, over_all_views, scan_field
from dasc.detect.val import fit_to_val
from dasc.judge.calibration import Calibration
from dasc.judge.metrics import plateau_threshold
from dasc.model.augment import dihedral
from dasc.model.checkpoint import Detector
from dasc.model.inference import embed_patches, filled, log_odds, score_patches, views_together
from dasc.model.network import CamNetwork


def test_merge_keeps_the_strongest_of_a_group():
    points = np.array([[0.0, 0], [5, 0], [9, 0], [100, 0]])
    assert merge(points, np.array([0.5, 0.9, 0.6, 0.2]), 6.0).tolist() == [1, 3]


def test_merge_against_a_naive_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points, probability = rng.uniform(0, 60, (40, 2)), rng.random(40).round(1)
        kept = []
        for index in sorted(range(40), key=lambda index: (-probability[index], index)):
            if all(np.hypot(*(points[index] - points[other])) > 8 for other in kept):
                kept.append(index)
        assert merge(points, probability, 8.0).tolist() == kept


def test_merge_of_nothing():
    assert merge(np.empty((0, 2)), np.empty(0), 5.0).tolist() == []


class Darkness(torch.nn.Module):
    """A network whose p(mitosis) is high where the middle of the patch is dark."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(40.0))

    def forward(self, patches):
        side = patches.shape[-1]
        middle = patches[:, :, side // 2 - 3 : side // 2 + 4, side // 2 - 3 : side // 2 + 4].mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(middle), self.scale * (0.4 - middle)], dim=1)


def detector_of(network, **changes):
    """A detector for patches of 64 px at 0.25 um/px that looks once at 1,800 candidates per mm2."""
    plain = Detector(
        network,
        patch_size=64,
        patch_um_per_px=0.25,
        normalise_stain=False,
        per_mm2=1800,
        merge_um=7.5,
        views=1,
        manifest_sha256=None,
    )
    return replace(plain, **changes)


def scan(image, um_per_px, views=1):
    return scan_field(detector_of(Darkness(), views=views), image, um_per_px, batch_size=16, smallest=0.05)


def test_scan_finds_the_dark_nuclei_at_any_resolution():
    for um_per_px in (0.2, 0.25, 0.5):
        image = np.full((round(200 / um_per_px), round(240 / um_per_px), 3), (235, 200, 220), np.uint8)
        centres_um = np.array([[40.0, 50], [150, 60], [100, 140]])
        for x, y in centres_um / um_per_px:
            cv2.circle(image, (round(x), round(y)), round(4 / um_per_px), (50, 30, 90), -1)
        found = scan(cv2.GaussianBlur(image, (0, 0), 0.5 / um_per_px), um_per_px)
        assert len(found) == 3
        distances = np.hypot(*(found[["x_px", "y_px"]].to_numpy()[:, None] * um_per_px - centres_um).transpose(2, 0, 1))
        assert distances.min(axis=0).max() < 2.5


def test_a_nucleus_cut_off_by_the_edge_is_not_looked_at():
    for um_per_px in (0.25, 0.5):
        image = np.full((round(100 / um_per_px), round(140 / um_per_px), 3), (235, 200, 220), np.uint8)
        for x, y in np.array([[0.5, 30], [40, 99.5], [139.5, 60], [80, 0.5], [70, 50], [4, 70], [100, 96]]) / um_per_px:
            cv2.circle(image, (round(x), round(y)), round(4 / um_per_px), (50, 30, 90), -1)
        found = scan(cv2.GaussianBlur(image, (0, 0), 0.5 / um_per_px), um_per_px)
        places = sorted((round(x), round(y)) for x, y in found[["x_px", "y_px"]].to_numpy() * um_per_px)
        assert len(places) == 3, places
        for place, expected in zip(places, [(4, 70), (70, 50), (100, 96)], strict=True):
            assert np.hypot(*np.subtract(place, expected)) < 2.5


def test_blank_field_gives_an_empty_table():
    found = scan(np.full((300, 300, 3), 245, np.uint8), 0.25)
    assert found.empty and list(found.columns) == ["x_px", "y_px", "probability"]


def test_scores_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network = CamNetwork("resnet10t").eval()
    patches = torch.randint(0, 255, (11, 3, 64, 64), dtype=torch.uint8)
    whole, parts = score_patches(network, patches, 64), score_patches(network, patches, 3)
    assert whole.shape == (11,) and torch.allclose(whole, parts, atol=1e-5)


def test_views_are_averaged():
    torch.manual_seed(0)
    network = CamNetwork("resnet10t").eval()
    patches = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    turned = torch.rot90(patches, 1, dims=(2, 3))
    for views, same in ((1, False), (4, True), (8, True)):
        scores = [score_patches(network, batch, 4, views) for batch in (patches, turned)]
        assert torch.allclose(*scores, atol=1e-5) is same


def test_every_core_scores_batches_of_its_own(monkeypatch):
    torch.manual_seed(0)
    network = CamNetwork("mobilenetv3_small_100").eval()
    patches = torch.randint(0, 255, (48, 3, 32, 32), dtype=torch.uint8)
    alone, features = score_patches(network, patches, 8), embed_patches(network, patches, 8)[0]
    threads = torch.get_num_threads()
    looked, whole, together = set(), CamNetwork.forward, threading.Barrier(3)

    def forward(self, batch):
        together.wait(60)  # of the six batches three at a time
        looked.add((threading.get_ident(), torch.get_num_threads()))
        return whole(self, batch)

    monkeypatch.setattr(CamNetwork, "forward", forward)
    try:
        torch.set_num_threads(3)
        assert torch.allclose(score_patches(network, patches, 8), alone, atol=1e-5)
        assert np.allclose(embed_patches(network, patches, 8)[0], features, atol=1e-4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert len(looked) == 3 and {count for _, count in looked} == {1}
    assert threading.get_ident() not in {thread for thread, _ in looked}


def test_a_second_look_has_the_average_of_all_views():
    torch.manual_seed(0)
    network = CamNetwork("resnet10t").eval()
    patches = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    for views in (2, 4, 8):
        first, others = (log_odds(network, patches, 4, which).numpy() for which in ([0], range(1, views)))
        at_once = score_patches(network, patches, 4, views).numpy()
        assert np.allclose(expit(over_all_views(first, others, views)), at_once, atol=1e-6)


def test_a_field_is_scored_as_its_patches_are():
    image = np.full((800, 900, 3), (235, 200, 220), np.uint8)
    for x, y, shade in ((200, 300, 50), (500, 300, 90), (400, 600, 120)):
        cv2.ellipse(image, (x, y), (18, 9), 30, 0, 360, (shade, shade - 10, shade + 30), -1)
    torch.manual_seed(0)
    network = CamNetwork("resnet10t").eval()
    for views in (1, 8):
        detector = detector_of(network, views=views)
        found = scan_field(detector, cv2.GaussianBlur(image, (0, 0), 2), 0.25, batch_size=16, smallest=0.0)
        cutter = PatchCutter(cv2.GaussianBlur(image, (0, 0), 2), 0.25, 0.25, 64)
        patches = cutter.cut_tensor(found[["x_px", "y_px"]].to_numpy())
        assert len(found) >= 3 and np.allclose(found["probability"], score_patches(network, patches, 16, views))


def test_a_field_searched_on_a_device_gives_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    image = np.full((900, 1100, 3), (235, 200, 220), np.uint8)
    for x, y in rng.uniform(40, 860, (120, 2)):
        shade = int(rng.integers(40, 150))
        cv2.circle(image, (round(x), round(y)), int(rng.integers(8, 18)), (shade, shade - 20, shade + 40), -1)
    image = (cv2.GaussianBlur(image, (0, 0), 1.5) + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
    found = scan(image, 0.25, views=8)
    monkeypatch.setattr(dasc.detect.field, "search_device", lambda device: device)
    searched = []
    whole = dasc.detect.candidates.smooth
    monkeypatch.setattr(
        dasc.detect.candidates, "smooth", lambda image, sigma: searched.append(image) or whole(image, sigma)
    )
    on_device = scan(image, 0.25, views=8)
    assert len(found) > 15 and len(searched) == 5 and all(isinstance(image, torch.Tensor) for image in searched)
    assert np.allclose(found, on_device, atol=1e-5)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """Three fields of nuclei of all shades, the darkest of which are mitoses."""
    root, rng, fields, mitoses = tmp_path_factory.mktemp("val"), np.random.default_rng(0), [], []
    for number in range(3):
        image = np.full((700, 800, 3), (235, 200, 220), np.uint8)
        for x, y in rng.uniform(40, 660, (80, 2)).round().astype(int).tolist():
            shade = int(rng.integers(60, 150))
            cv2.circle(image, (x, y), int(rng.integers(8, 16)), (shade, shade - 20, shade + 40), -1)
            if shade < 90:
                mitoses.append((f"{number}", x, y))
        cv2.imwrite(str(root / f"{number}.png"), cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), 1.5), cv2.COLOR_RGB2BGR))
        fields.append((f"{number}", f"{number}.png", 0.25))
    fields = pd.DataFrame(fields, columns=["image", "path", "um_per_px"])
    return ValFields(root, fields, pd.DataFrame(mitoses, columns=["image", "x_px", "y_px"]).assign(label=1))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("changes", [{}, {"views": 4}, {"merge_um": 20.0}, {"per_mm2": 300.0}])
def test_val_is_scanned_as_the_detector_says(val, changes, align):
    before = detector_of(Darkness(), calibration=Calibration(2.0, 1.0, 3.0), **changes)
    fitted, curve, probabilities, right = fit_to_val(before, val, batch_size=16, match_um=7.5, align=align)
    alignment = fitted.calibration.alignment
    assert (alignment is not None) == align
    aligned = replace(before, calibration=Calibration(alignment=alignment))
    images = [cv2.cvtColor(cv2.imread(str(val.root / path)), cv2.COLOR_BGR2RGB) for path in val.fields["path"]]
    found = [scan_field(aligned, image, 0.25, batch_size=16, smallest=0.01) for image in images]
    assert probabilities.tolist() == [value for table in found for value in table["probability"]]
    assert right.shape == probabilities.shape and right.sum() > 5
    assert fitted.val_curve == curve.to_dict("list") and fitted.threshold == plateau_threshold(curve)
    assert replace(fitted, calibration=before.calibration, threshold=0.5, val_curve=None) == before
    calibrated = scan_field(fitted, images[0], 0.25, batch_size=16, smallest=0.0)["probability"][: len(found[0])]
    assert np.allclose(calibrated, fitted.calibration.calibrate(found[0]["probability"]), atol=1e-6)


def test_glass_beside_the_tissue_changes_nothing(monkeypatch):
    """Candidates are counted per mm2 of tissue, in a field as on a slide."""
    rng = np.random.default_rng(0)
    tissue = np.clip(rng.normal((190, 110, 170), 40, (800, 1600, 3)), 0, 255).astype(np.uint8)
    tissue = cv2.GaussianBlur(tissue, (0, 0), 3)
    glass = np.full((800, 3200, 3), 243, np.uint8)
    numbers = []
    monkeypatch.setattr(
        dasc.detect.field, "find_candidates", lambda *_: (rng.uniform(40, 760, (5000, 2)) * (2, 1), None)
    )
    for field in (tissue, np.hstack([tissue, glass])):
        looked = dasc.detect.field.look_at(detector_of(Darkness(), views=2), field, 0.25, batch_size=32)
        numbers.append((len(looked.first), len(looked.points_px)))
    assert numbers[1] == pytest.approx(numbers[0], rel=0.15), numbers


def test_views_together_are_views_in_turn():
    network = CamNetwork("resnet10t", 16).eval()
    batch = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one_by_one = torch.stack([network(dihedral(batch, view)) for view in range(1, 8)]).mean(dim=0)
        torch.testing.assert_close(views_together(network, batch, range(1, 8)), one_by_one)


def test_batches_are_filled_up():
    for number, whole in ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (130, 256)):
        batch = filled(torch.arange(number)[:, None])
        assert len(batch) == whole and batch[:number, 0].tolist() == list(range(number)) and not batch[number:].any()
