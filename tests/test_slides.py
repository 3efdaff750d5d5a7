"""Slides are read by region: the same pixels as the whole image, whatever the file is called."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from broken import first_tile
from PIL import Image

from dasc.errors import InputError
from dasc.images import slides
from dasc.images.read import read_field
from dasc.images.slides import MakersSlide, PictureSlide, TiffSlide, open_slide, read_overview

WSI = Path(__file__).resolve().parents[2] / "shared/data/wsi"


def picture(height=600, width=700):
    """Smooth colours, which lossy compression hardly changes."""
    rows, columns = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(rows / 60 + shift) * np.cos(columns / 80 - shift) for shift in range(3)]
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(slides, "IN_MEMORY", 200_000)


KINDS = {
    "tiled jpeg": {"tile": (128, 128), "compression": "jpeg"},
    "tiled jpeg2000": {"tile": (128, 128), "compression": "jpeg2000"},
    "tiled lzw": {"tile": (128, 128), "compression": "lzw"},
    "striped lzw": {"rowsperstrip": 50, "compression": "lzw"},
    "striped jpeg": {"rowsperstrip": 48, "compression": "jpeg"},
    "striped plain": {"rowsperstrip": 50},
    "tiled plain": {"tile": (128, 128)},
    "big": {"tile": (128, 128), "compression": "deflate", "bigtiff": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_parts_of_the_whole(tmp_path, kind):
    path = tmp_path / "slide.png"  # the name lies
    tifffile.imwrite(path, picture(), photometric="rgb", resolution=(40000, 40000), resolutionunit=3, **KINDS[kind])
    with open_slide(path) as slide:
        assert isinstance(slide, TiffSlide) and slide.levels == [(700, 600)] and slide.um_per_px == 0.25
        whole = slide.read_region(0, 0, 0, 700, 600)
        assert (whole == read_field(path)).all() and np.abs(whole.astype(int) - picture()).mean() < 4
        assert (slide.read_region(0, 321, 130, 200, 300) == whole[130:430, 321:521]).all()
        outside = slide.read_region(0, 650, -20, 100, 60)
        assert (outside[20:, :50] == whole[:40, 650:]).all()
        assert (outside[:20] == 255).all() and (outside[:, 50:] == 255).all()
        assert (slide.read_region(0, 900, 900, 10, 20) == 255).all()


def write_pyramid(path, image, factors=(2, 4), **options):
    options = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb"} | options
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, subifds=len(factors), resolution=(40000, 40000), resolutionunit=3, **options)
        for factor in factors:
            small = image.reshape(len(image) // factor, factor, -1, factor, 3).mean(axis=(1, 3)).astype(np.uint8)
            writer.write(small, subfiletype=1, **options)


def test_levels_of_a_pyramid(tmp_path):
    image = picture(640, 768)
    write_pyramid(tmp_path / "a.tif", image)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels == [(768, 640), (384, 320), (192, 160)]
        assert [slide.level_for(factor) for factor in (0.5, 1, 1.9, 2, 3.98, 100)] == [0, 0, 0, 1, 2, 2]
        small = slide.read_region(2, 0, 0, 192, 160)
        assert np.abs(small.astype(int) - image[::4, ::4]).mean() < 5
        for factor in (4, 7, 16):
            overview, exact = read_overview(slide, factor, workers=2)
            assert overview.shape[:2] == tuple(-(-side // exact) for side in image.shape[:2]) and exact >= 0.7 * factor
            y, x = 60 // exact, 120 // exact
            centre = image[round((y + 0.5) * exact), round((x + 0.5) * exact)].astype(int)
            assert np.abs(overview[int(y), int(x)] - centre).max() < 30


def test_overview_does_not_depend_on_the_blocks(tmp_path, monkeypatch):
    write_pyramid(tmp_path / "a.tif", picture(640, 768), compression="lzw")
    overviews = []
    for block in (64, 2048):
        monkeypatch.setattr(slides, "BLOCK_PX", block)
        with open_slide(tmp_path / "a.tif") as slide:
            overviews.append(read_overview(slide, 10, workers=1)[0])
    assert (overviews[0] == overviews[1]).all()


def test_small_and_unusual_images_are_read_whole(tmp_path):
    tifffile.imwrite(tmp_path / "sixteen.tif", picture().astype(np.uint16) * 16, photometric="rgb")
    tifffile.imwrite(tmp_path / "small.tif", picture(100, 200), photometric="rgb")
    Image.fromarray(picture()).save(tmp_path / "picture.tif", format="PNG")
    for name in ("sixteen.tif", "small.tif", "picture.tif"):
        with open_slide(tmp_path / name) as slide:
            assert isinstance(slide, PictureSlide) and slide.um_per_px is None
            whole = slide.read_region(0, 0, 0, slide.width, slide.height)
            assert (whole == read_field(tmp_path / name)).all()


def test_tiles_never_written_are_white(tmp_path):
    image = picture(640, 768)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(128, 128), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        sizes = [0, *tif.pages[0].databytecounts[1:]]
        tif.pages[0].tags["TileByteCounts"].overwrite(sizes)
    with open_slide(tmp_path / "a.tif") as slide:
        region = slide.read_region(0, 0, 0, 256, 128)
    assert (region[:, :128] == 255).all() and (region[:, 128:] == image[:128, 128:256]).all()


@pytest.mark.parametrize("where", ["end", "tile"])
def test_broken_slides_are_named(tmp_path, where):
    path = tmp_path / "broken.tif"
    write_pyramid(path, picture(640, 768), compression="deflate")
    data = bytearray(path.read_bytes())
    if where == "end":
        path.write_bytes(data[: len(data) // 3])
        with pytest.raises(InputError, match=r"broken\.tif"):
            open_slide(path)
        return
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].dataoffsets[8]
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    with open_slide(path) as slide:
        slide.read_region(0, 0, 0, 128, 128)
        with pytest.raises(InputError, match=r"broken\.tif.*level 0"):
            slide.read_region(0, 0, 0, 768, 640)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000"])
def test_a_tile_whose_end_was_never_written_is_named(tmp_path, kind):
    """What an interrupted copy leaves; decoders fill it with gray and say nothing."""
    path = tmp_path / "broken.tif"
    tifffile.imwrite(path, picture(640, 768), tile=(128, 128), photometric="rgb", compression=kind)
    first_tile(path)
    with open_slide(path) as slide:
        assert isinstance(slide, TiffSlide)
        slide.read_region(0, 128, 0, 128, 128)
        with pytest.raises(InputError, match=rf"broken\.tif.*truncated {kind.upper()}"):
            slide.read_region(0, 0, 0, 768, 640)


def test_alpha_is_dropped_and_padding_is_white(tmp_path):
    image = np.dstack([picture(), np.full((600, 700), 255, np.uint8)])
    image[:100, :100] = 0
    options = {"tile": (128, 128), "photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "lzw"}
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        region = slide.read_region(0, 50, 50, 200, 100)
        assert isinstance(slide, TiffSlide) and region.shape == (100, 200, 3)
    assert (region[:50, :50] == 255).all() and (region[50:] == image[100:150, 50:250, :3]).all()


def test_what_a_scanner_never_saw_is_white_and_its_frame_is_known(tmp_path, monkeypatch):
    """OpenSlide gives such pixels alpha 0; no small file of such a maker is at hand, so its reader is replaced."""

    class Scanned:
        level_dimensions, level_downsamples = ((700, 600), (175, 150)), (1.0, 4.0)

        def __init__(self):
            self.properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2501", "openslide.bounds-x": "40"}

        def read_region(self, place, level, size):
            self.asked = (place, level, size)
            pixels = np.zeros((size[1], size[0], 4), np.uint8)
            pixels[:, 5:] = (90, 60, 120, 255)
            return Image.fromarray(pixels)

    scanned = Scanned()
    monkeypatch.setattr(slides.openslide, "OpenSlide", lambda path: scanned)
    slide = MakersSlide(tmp_path / "a.mrxs", "mirax")
    region = slide.read_region(1, 10, 20, 30, 40)
    assert scanned.asked == ((40, 80), 1, (30, 40)) and slide.um_per_px == 0.25 and slide.origin_px == (40, 0)
    assert (region[:, :5] == 255).all() and (region[:, 5:] == (90, 60, 120)).all()
    scanned.properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}
    assert MakersSlide(tmp_path / "a.mrxs", "mirax").um_per_px is None


def test_paths_of_every_alphabet(tmp_path):
    folder = tmp_path / "Präparat 病理 ü"
    folder.mkdir()
    write_pyramid(folder / "ж.svs", picture(640, 768))
    with open_slide(folder / "ж.svs") as slide:
        assert slide.width == 768


@pytest.mark.parametrize("content", [b"", b"text, no image", b"II*\0\0\0\0\0"])
def test_what_is_no_slide_is_refused(tmp_path, content):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.svs"):
        open_slide(tmp_path / "a.svs")
    with pytest.raises(InputError, match="nowhere"):
        open_slide(tmp_path / "nowhere.svs")


@pytest.mark.skipif(not WSI.is_dir(), reason="needs the real slides of ../shared")
def test_real_slides():
    with open_slide(WSI / "cmu-1-small-region.svs") as slide:
        assert isinstance(slide, MakersSlide) and "aperio" in slide.reader
        assert slide.levels == [(2220, 2967)] and slide.um_per_px == 0.499
        region = slide.read_region(0, 500, 700, 300, 200)
        assert np.abs(region.astype(int) - read_field(slide.path)[700:900, 500:800]).mean() < 2
        overview, factor = read_overview(slide, 16, 2)
        assert factor == 16 and overview.shape == (186, 139, 3)
    with open_slide(WSI / "boxes.tiff") as slide:
        assert slide.um_per_px is None and (slide.width, slide.height) == (300, 250)
    with pytest.raises(InputError, match="52479"), open_slide(WSI / "unopenable.tiff"):
        pass


def test_openslide_reads_what_tifffile_reads(tmp_path):
    """A plain tiled pyramid, which both read: the same levels, and the same regions at every one of them."""
    write_pyramid(tmp_path / "a.tif", picture(640, 768), compression="deflate")
    with MakersSlide(tmp_path / "a.tif", "generic-tiff") as one, TiffSlide(tmp_path / "a.tif") as other:
        assert one.levels[0] == other.levels[0] == (768, 640)
        for level in range(len(one.levels)):
            place = level, -10, 7, one.levels[level][0] - 9, 90
            assert (one.read_region(*place) == other.read_region(*place)).all()


def test_a_slide_in_the_form_of_a_maker_is_known_by_its_bytes(tmp_path):
    """Aperio's: levels as pages of their own, a thumbnail between them, and the resolution in the description."""
    image = picture(640, 768)
    path = tmp_path / "slide.png"
    says = "Aperio Image Library v11.2.1\r\n768x640 [0,0 768x640] (128x128) JPEG/RGB Q=90|AppMag = 40|MPP = 0.2510"
    options = {"photometric": "rgb", "metadata": None, "compression": "jpeg"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, tile=(128, 128), description=says, **options)
        writer.write(image[::8, ::8].copy(), rowsperstrip=80, description="Aperio thumbnail", **options)
        writer.write(image[::4, ::4].copy(), tile=(128, 128), description="Aperio level", **options)
    with open_slide(path) as slide:
        assert isinstance(slide, MakersSlide) and "aperio" in slide.reader and slide.um_per_px == 0.251
        assert slide.levels == [(768, 640), (192, 160)] and slide.downsample(1) == 4
        for level, step in ((0, 1), (1, 4)):
            region = slide.read_region(level, 60, 20, 100, 130).astype(int)
            assert np.abs(region - image[::step, ::step][20:150, 60:160]).mean() < 5
        assert (slide.read_region(1, 150, 100, 60, 70)[:, 42:] == 255).all()  # beyond the edge


def test_levels_of_any_step_are_known_and_a_label_is_none(tmp_path):
    """Reduced by 16, which tifffile does not take for a level; the label has sides of its own."""
    image = picture(1280, 1600)
    options = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(image, subifds=1, **options)
        writer.write(image[::16, ::16].copy(), subfiletype=1, **options)
        writer.write(image[:200, :200].copy(), subfiletype=1, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels == [(1600, 1280), (100, 80)] and slide.level_for(20) == 1
        assert np.abs(slide.read_region(1, 0, 0, 100, 80).astype(int) - image[::16, ::16]).mean() < 5


def test_a_slide_in_the_form_of_hamamatsus(tmp_path):
    """NDPI: every level one JPEG in a TIFF with the maker's tags, the macro photograph (lens -1) among the pages."""
    image = picture(640, 768)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for step, lens in ((1, 40.0), (4, 10.0), (8, -1.0)):
            tags = [(65420, "I", 1, 1, True), (65421, "f", 1, lens, True)]  # format, lens
            tags += [(number, "i", 1, 0, True) for number in (65422, 65423, 65424)]  # place on the glass, focus
            options = {"photometric": "rgb", "compression": "jpeg", "rowsperstrip": 640 // step, "metadata": None}
            options |= {"extratags": tags, "resolution": (40000, 40000), "resolutionunit": 3}
            writer.write(image[::step, ::step].copy(), **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert isinstance(slide, MakersSlide) and "hamamatsu" in slide.reader and slide.um_per_px == 0.25
        assert slide.levels[0] == (768, 640) and (192, 160) in slide.levels
        for level, step in ((0, 1), (slide.levels.index((192, 160)), 4)):
            region = slide.read_region(level, 60, 20, 100, 130).astype(int)
            assert np.abs(region - image[::step, ::step][20:150, 60:160]).mean() < 5
