"""Near-duplicates: copies are found however they were stored, other tissue is not."""

import cv2
import numpy as np
import pytest

from dasc.data.patches import write_patch
from dasc.weak.duplicates import near_duplicates, thumbnail, thumbnails

SAME = 0.95  # SAME_CORRELATION of NS/weak_mining.py


def tissue(rng, size=64):
    """A smooth random picture with detail at several scales, as tissue has."""
    image = sum(
        cv2.resize(rng.normal(size=(cells, cells, 3)), (size, size), interpolation=cv2.INTER_CUBIC) * 60 / cells**0.5
        for cells in (2, 4, 8, 16, 32)
    )
    return np.clip(image + 140, 0, 255).astype(np.uint8)


def jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


CHANGES = {
    "nothing": lambda image: image,
    "JPEG": lambda image: jpeg(image, 30),
    "turned": lambda image: np.rot90(image).copy(),
    "mirrored and turned": lambda image: np.rot90(image[:, ::-1], 3).copy(),
    "lighter": lambda image: np.clip(image * 0.8 + 40, 0, 255).astype(np.uint8),
    "resized": lambda image: cv2.resize(image, (40, 40), interpolation=cv2.INTER_AREA),
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_is_found(name):
    rng = np.random.default_rng(0)
    pictures = [tissue(rng) for _ in range(20)]
    protected = np.array([thumbnail(picture) for picture in pictures])
    changed = np.array([thumbnail(CHANGES[name](picture)) for picture in pictures])
    assert near_duplicates(changed, protected, SAME).all()


def test_other_tissue_is_not():
    rng = np.random.default_rng(0)
    ours, others = (np.array([thumbnail(tissue(rng)) for _ in range(100)]) for _ in range(2))
    assert not near_duplicates(others, ours, SAME).any()


def test_as_a_naive_loop():
    rng = np.random.default_rng(3)
    protected = rng.integers(0, 255, size=(6, 16, 16)).astype(np.uint8)
    pictures = np.array([protected[row % 6] * share + rng.integers(0, 255, (16, 16)) * (1 - share)
                         for row, share in enumerate(np.linspace(0, 1, 30))]).astype(np.uint8)  # fmt: skip
    pictures = np.array([np.rot90(picture, row) for row, picture in enumerate(pictures)])
    expected = []
    for picture in pictures:
        views = [np.rot90(side, turns) for one in protected for side in (one, one[::-1]) for turns in range(4)]
        expected.append(max(np.corrcoef(picture.ravel(), view.ravel())[0, 1] for view in views) >= 0.8)
    assert near_duplicates(pictures, protected, 0.8).tolist() == expected and 0 < sum(expected) < 30


def test_flat_pictures_and_empty_sets():
    flat = np.full((3, 16, 16), 240, dtype=np.uint8)
    assert not near_duplicates(flat, flat, SAME).any()
    assert not near_duplicates(flat, flat[:0], SAME).any()
    assert near_duplicates(flat[:0], flat, SAME).shape == (0,)


def test_thumbnails_of_files(tmp_path):
    pictures = [tissue(np.random.default_rng(seed)) for seed in range(3)]
    for number, picture in enumerate(pictures):
        write_patch(tmp_path / f"{number}.png", picture.transpose(2, 0, 1))
    made = thumbnails([tmp_path / f"{number}.png" for number in range(3)], 2)
    assert (made == np.array([thumbnail(picture) for picture in pictures])).all()
    assert thumbnails([], 2).shape == (0, 16, 16)
