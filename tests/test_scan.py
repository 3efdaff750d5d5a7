"""Scanning a slide: how it is cut, resumed or stored changes nothing that is found."""

from dataclasses import replace

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from scipy.spatial import cKDTree
from scipy.special import logit
from test_detect import Darkness, detector_of

from dasc.detect import slide as scan
from dasc.detect.field import off_the_edge, scan_field
from dasc.detect.slide import Looks, Progress, scan_slide
from dasc.detect.tiles import Tile, make_grid
from dasc.errors import InputError
from dasc.images import slides
from dasc.images.slides import open_slide, read_overview
from dasc.images.tissue import Tissue, find_tissue
from dasc.judge.calibration import Calibration

OPTIONS = {"batch_size": 50, "smallest": 0.05}


def draw_tissue(side_um, um_per_px, seed=0):
    """Pink tissue with 3,000 nuclei per mm2 of all shades, in the middle of blank glass, and the centres in px."""
    rng = np.random.default_rng(seed)
    side = round(side_um / um_per_px)
    image = np.full((side, side, 3), (242, 240, 243), np.uint8)
    cv2.circle(image, (side // 2, side // 2), round(0.46 * side), (225, 175, 205), -1)
    centres = rng.uniform(0.1 * side, 0.9 * side, (round(3000 * side_um**2 / 1e6), 2))
    centres = centres[np.hypot(*(centres - side / 2).T) < 0.42 * side]
    for centre in centres:
        shade = rng.uniform(0.15, 0.8)
        colour = [int(v) for v in np.array([90, 50, 130]) * shade + np.array([200, 160, 210]) * (1 - shade)]
        axes = [round(float(a) * 16 / um_per_px) for a in rng.uniform(2, 4.5, 2)]
        place = [round(float(v) * 16) for v in centre]
        cv2.ellipse(image, place, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA, 4)
    noise = rng.normal(0, 4, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.4 / um_per_px) + noise, 0, 255).astype(np.uint8), centres


@pytest.fixture(scope="module", params=[0.25, 0.2274, 0.5])
def slide_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    image, _ = draw_tissue(480, request.param)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "lzw"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, subifds=1, resolution=(1e4 / request.param,) * 2, resolutionunit=3, **options)
        writer.write(cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), subfiletype=1, **options)
    return path, request.param


@pytest.fixture(autouse=True)
def every_tiff_by_region(monkeypatch):
    monkeypatch.setattr(slides, "IN_MEMORY", 300_000)


def tissue_of(slide, um_per_px):
    overview, pixel_px = read_overview(slide, 8 / um_per_px, workers=2)
    return Tissue(find_tissue(overview, pixel_px * um_per_px), pixel_px)


def soft():
    """A detector that gives hardly two nuclei the same probability."""
    network = Darkness()
    network.scale.data.fill_(8.0)
    return detector_of(network, normalise_stain=True, views=2)


def found_in(path, um_per_px, tissue=None, detector=None, **options):
    with open_slide(path) as slide:
        tissue = tissue or tissue_of(slide, um_per_px)
        return scan_slide(detector or soft(), slide, um_per_px, tissue, **OPTIONS | {"workers": 2} | options)


def assert_same(one, other):
    """The same detections, to the last one; weak ones may differ by what adding in another order changes."""
    assert len(one) == len(other)
    assert np.allclose(one[["x_px", "y_px"]], other[["x_px", "y_px"]], atol=1e-6)
    assert np.allclose(one["probability"], other["probability"], atol=1e-4)


def test_shifted_tiles_find_the_same(slide_file):
    path, um_per_px = slide_file
    once = found_in(path, um_per_px, tile_um=1e6)
    assert len(once) > 30
    for tile_um, shift in ((200, (1, 2)), (140, (0, 1))):
        assert_same(once, found_in(path, um_per_px, tile_um=tile_um, shift=shift, workers=1, batch_size=17))


def test_a_slide_gives_nearly_what_a_field_gives(slide_file):
    """Where all is surveyed, only the um/px rounded for the blocks, their margins and the tissue's edge differ."""
    path, um_per_px = slide_file
    image = tifffile.imread(path)
    field = scan_field(soft(), image, um_per_px, **OPTIONS)
    slide = found_in(path, um_per_px)
    strong = [table[table["probability"] > 0.5][["x_px", "y_px"]].to_numpy() * um_per_px for table in (field, slide)]
    near = np.linalg.norm(strong[0][:, None] - strong[1], axis=2) < 1
    assert len(strong[0]) > 30 and near.any(axis=1).mean() > 0.9 and near.any(axis=0).mean() > 0.9


def test_a_slide_is_aligned_with_val_as_a_field_is(slide_file):
    path, um_per_px = slide_file
    image = tifffile.imread(path)
    everywhere = Tissue(np.ones((len(image) // 16, len(image) // 16), bool), 16)
    odds = {}
    for name, calibration in (("own", Calibration()), ("val's", Calibration(alignment=0.7))):
        detector = replace(soft(), calibration=calibration)
        field = scan_field(detector, image, um_per_px, **OPTIONS)
        slide = found_in(path, um_per_px, everywhere, detector)
        pairs = cKDTree(slide[["x_px", "y_px"]]).query(field[["x_px", "y_px"]], distance_upper_bound=1 / um_per_px)
        near = np.isfinite(pairs[0])
        assert near.sum() > 30
        of_field, of_slide = field["probability"].to_numpy()[near], slide["probability"].to_numpy()[pairs[1][near]]
        odds[name] = np.median(logit(of_field)), np.median(logit(of_slide) - logit(of_field))
    assert abs(odds["own"][1]) < 0.05 and abs(odds["val's"][1]) < 0.15
    assert abs(odds["own"][0] - odds["val's"][0]) > 0.4


def test_places_are_those_of_the_nuclei(tmp_path):
    image, centres = draw_tissue(400, 0.25, seed=3)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw")
    found = found_in(tmp_path / "a.tif", 0.25)
    distance = np.linalg.norm(found[["x_px", "y_px"]].to_numpy()[:, None] - centres, axis=2).min(axis=1)
    assert len(found) > 12 and np.median(distance) * 0.25 < 1


def test_nuclei_cut_off_by_the_edge_are_not_looked_at(tmp_path, monkeypatch):
    image, _ = draw_tissue(400, 0.25, seed=3)
    height, width = image.shape[:2]
    for place in ((0, 200), (width - 1, 120), (150, 1), (260, height - 4)):
        cv2.circle(image, place, 14, (50, 30, 90), -1)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw")

    def at_the_edge():
        found = found_in(tmp_path / "a.tif", 0.25)[["x_px", "y_px"]].to_numpy()
        return (~off_the_edge(found, width, height, 0.25)).sum(), len(found)

    nothing, inside = at_the_edge()
    assert nothing == 0 and inside > 12
    monkeypatch.setattr("dasc.detect.slide.off_the_edge", lambda points, *_: np.ones(len(points), bool))
    assert at_the_edge()[0] >= 4


def test_a_finer_slide_is_scanned_at_a_coarser_level(tmp_path):
    image, _ = draw_tissue(300, 0.125)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        options = {"tile": (256, 256), "photometric": "rgb", "compression": "lzw"}
        writer.write(image, subifds=1, **options)
        writer.write(cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), subfiletype=1, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        grid = make_grid(slide, 0.125, 0.25, 64)
        assert (grid.level, grid.um_per_px, grid.downsample) == (1, 0.25, 2)
        assert np.allclose(grid.in_slide(np.array([[10.0, 0.0]])), [[20.5, 0.5]])
    fine = found_in(tmp_path / "a.tif", 0.125)
    tifffile.imwrite(tmp_path / "b.tif", image[::1, ::1], tile=(256, 256), photometric="rgb", compression="lzw")
    whole = found_in(tmp_path / "b.tif", 0.125)
    near = np.linalg.norm(fine.to_numpy()[:, None, :2] - whole.to_numpy()[:, :2], axis=2).min(axis=1)
    assert len(fine) > 8 and (near * 0.125 < 1.5).mean() > 0.9


@pytest.mark.parametrize("um_per_px", [0.12, 0.2201, 0.2274, 0.25, 0.262, 0.3, 0.499, 0.5, 0.7])
def test_blocks_have_whole_pixels_at_every_resolution(um_per_px):
    slide = slides.Slide()
    slide.levels = [(50_001, 40_003)]
    grid = make_grid(slide, um_per_px, 0.25, 80)
    for told, target in ((grid.search_um, max(0.5, um_per_px)), (grid.model_um, 0.25)):
        assert told == pytest.approx(um_per_px, rel=0.003)
        assert grid.step * told / target == pytest.approx(round(grid.step * told / target), abs=1e-6)
    assert grid.step * um_per_px >= 64


def test_resumed_after_any_save_it_finds_the_same(tmp_path, monkeypatch):
    image, _ = draw_tissue(400, 0.25)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw")
    monkeypatch.setattr(scan, "SAVE_EVERY", 2)
    whole = found_in(tmp_path / "a.tif", 0.25, tile_um=70)
    saved = []

    def stop_at_the_third(progress):
        saved.append(Progress(progress.survey, progress.tiles, list(progress.found)))
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found_in(tmp_path / "a.tif", 0.25, tile_um=70, save=stop_at_the_third)
    assert [one.tiles for one in saved] == [2, 4, 6] and saved[2].found
    for progress in saved:
        assert_same(whole, found_in(tmp_path / "a.tif", 0.25, tile_um=70, progress=progress))


def test_batches_fill_across_tiles():
    sizes = []

    class Counting(Darkness):
        def forward(self, patches):
            sizes.append(len(patches))
            return super().forward(patches)

    patches = torch.randint(0, 255, (100, 3, 32, 32), dtype=torch.uint8)
    points = np.arange(200.0).reshape(100, 2)
    looks = Looks(Counting(), 16, 1, 0.0, 0.0)
    for start in range(0, 100, 7):
        part = slice(start, start + 7)
        looks.add(points[part], patches[part], np.zeros(len(points[part]), np.float32))
    assert set(sizes) == {16}
    found = looks.flush()
    assert sizes[-1] == 4 and sum(sizes) == 100 and np.array(found)[:, :2].tolist() == points.tolist()
    assert looks.flush() == []


def test_nothing_but_glass(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((900, 900, 3), 240, np.uint8), tile=(256, 256), photometric="rgb")
    assert found_in(tmp_path / "a.tif", 0.25).empty


def test_tissue_without_a_nucleus(tmp_path):
    image = np.full((1200, 1200, 3), (225, 175, 205), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb")
    assert found_in(tmp_path / "a.tif", 0.25).empty


def test_a_broken_tile_is_named(tmp_path):
    image, _ = draw_tissue(400, 0.25)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        place = tif.pages[0].dataoffsets[17]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[place : place + 50] = bytes(50)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tif.*cannot be read"):
        found_in(tmp_path / "a.tif", 0.25)


def test_memory_of_the_device_halves_the_batch():
    class Full(Darkness):
        def forward(self, patches):
            if len(patches) > 5:
                raise torch.OutOfMemoryError("full")
            return super().forward(patches)

    patches = torch.randint(0, 255, (23, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(scan.log_odds(Full(), patches, 20), scan.log_odds(Darkness(), patches, 20))


def test_tile_margins_reach_as_far_as_they_must(tmp_path):
    """The patches of a tile are those of the whole slide, up to its very corners."""
    image, _ = draw_tissue(400, 0.2274)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw")
    with open_slide(tmp_path / "a.tif") as slide:
        grid = make_grid(slide, 0.2274, 0.25, 64)
        down, across = grid.shape
        assert down > 4
        whole = Tile(slide, grid, (0, down), (0, across))
        part = Tile(slide, grid, (2, 3), (2, 3))
        corners = np.array([[2, 2], [3, 2], [2, 3], [3, 3]]) * float(grid.step)
        difference = whole.patches(corners, soft(), None).int() - part.patches(corners, soft(), None)
        assert difference.abs().max() <= 1


def small_tile(image, y, x):
    """A tile of 1024 px, filled up beyond the image's edge."""
    part = image[y : y + 1024, x : x + 1024]
    beyond = [(0, 1024 - part.shape[0]), (0, 1024 - part.shape[1]), (0, 0)]
    return np.ascontiguousarray(np.pad(part, beyond, mode="edge"))


def test_a_pyramid_of_20000_px_is_scanned_by_parts(tmp_path, monkeypatch):
    """400 million pixels of JPEG, all glass but for one piece of tissue, read a few at a time."""
    piece, centres = draw_tissue(512, 0.25)
    left, top, side = 6144, 12288, 20_000
    encode = {"level": 90, "colorspace": "rgb", "outcolorspace": "ycbcr", "subsampling": "444"}
    glass = imagecodecs.jpeg8_encode(np.full((1024, 1024, 3), (242, 240, 243), np.uint8), **encode)
    places = [(y, x) for y in range(0, side, 1024) for x in range(0, side, 1024)]
    corners = [(y, x) for y in (0, 1024) for x in (0, 1024)]
    tiles = {(top + y, left + x): imagecodecs.jpeg8_encode(small_tile(piece, y, x), **encode) for y, x in corners}
    options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "tile": (1024, 1024)}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        parts = (tiles.get(place, glass) for place in places)
        writer.write(parts, shape=(side, side, 3), dtype=np.uint8, subifds=1, **options)
        small = np.full((side // 16, side // 16, 3), (242, 240, 243), np.uint8)
        shown = cv2.resize(piece, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)
        small[top // 16 : top // 16 + 128, left // 16 : left // 16 + 128] = shown
        coarse = [imagecodecs.jpeg8_encode(small_tile(small, y, x), **encode) for y, x in corners]
        writer.write(iter(coarse), shape=small.shape, dtype=np.uint8, subfiletype=1, **options)
    read = []
    whole = slides.TiffSlide.read_region

    def count(self, level, x, y, width, height):
        read.append(width * height)
        return whole(self, level, x, y, width, height)

    monkeypatch.setattr(slides.TiffSlide, "read_region", count)
    monkeypatch.setattr(slides, "IN_MEMORY", 50_000_000)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels == [(side, side), (side // 16, side // 16)]
        tissue = tissue_of(slide, 0.25)
        found = scan_slide(soft(), slide, 0.25, tissue, **OPTIONS, workers=2)
    assert 1 < tissue.area_mm2(0.25) / (np.pi * (0.46 * 0.512) ** 2) < 1.5  # with its margin
    strong = found[found["probability"] > 0.5][["x_px", "y_px"]].to_numpy()
    distance = np.linalg.norm(strong[:, None] - (centres + np.array([left, top])), axis=2).min(axis=1) * 0.25
    assert len(strong) > 30 and np.median(distance) < 1 and distance.max() < 6
    assert max(read) < 30e6 and sum(read) < 100e6
