"""Merging and scanning: the strongest stays, nothing is counted twice, places are the field's own pixels."""

import threading

import cv2
import numpy as np
import torch

import dasc.detect
from dasc.detect import embed_patches, merge, scan_field, score_patches
from dasc.network import SearchNetwork


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


def scan(image, um_per_px, views=1):
    config = {"patch_size": 64, "um_per_px": 0.25, "normalise_stain": False}
    options = {"batch_size": 16, "per_mm2": 1800, "merge_um": 7.5, "smallest": 0.05}
    return scan_field(Darkness(), config, image, um_per_px, views=views, **options)


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


def test_blank_field_gives_an_empty_table():
    found = scan(np.full((300, 300, 3), 245, np.uint8), 0.25)
    assert found.empty and list(found.columns) == ["x_px", "y_px", "probability"]


def test_scores_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network = SearchNetwork("resnet10t").eval()
    patches = torch.randint(0, 255, (11, 3, 64, 64), dtype=torch.uint8)
    whole, parts = score_patches(network, patches, 64), score_patches(network, patches, 3)
    assert whole.shape == (11,) and torch.allclose(whole, parts, atol=1e-5)


def test_views_are_averaged():
    torch.manual_seed(0)
    network = SearchNetwork("resnet10t").eval()
    patches = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    turned = torch.rot90(patches, 1, dims=(2, 3))
    for views, same in ((1, False), (4, True), (8, True)):
        scores = [score_patches(network, batch, 4, views) for batch in (patches, turned)]
        assert torch.allclose(*scores, atol=1e-5) is same


def test_every_core_scores_batches_of_its_own(monkeypatch):
    torch.manual_seed(0)
    network = SearchNetwork("mobilenetv3_small_100").eval()
    patches = torch.randint(0, 255, (48, 3, 32, 32), dtype=torch.uint8)
    alone, features = score_patches(network, patches, 8), embed_patches(network, patches, 8)[0]
    threads = torch.get_num_threads()
    looked, whole, together = set(), dasc.detect._score_batch, threading.Barrier(3)

    def look(*args):
        together.wait(60)  # of the six batches three at a time
        looked.add((threading.get_ident(), torch.get_num_threads()))
        return whole(*args)

    monkeypatch.setattr(dasc.detect, "_score_batch", look)
    try:
        torch.set_num_threads(3)
        assert torch.allclose(score_patches(network, patches, 8), alone, atol=1e-5)
        assert np.allclose(embed_patches(network, patches, 8)[0], features, atol=1e-4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert len(looked) == 3 and {count for _, count in looked} == {1}
    assert threading.get_ident() not in {thread for thread, _ in looked}
