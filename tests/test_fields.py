"""Images of every kind: right pixels or an InputError that names the file."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from dasc.errors import InputError
from dasc.images import read as fields
from dasc.images.find import find_images
from dasc.images.read import read_field
from dasc.images.resolution import read_um_per_px

SHARED = Path(__file__).resolve().parents[2] / "shared"
WSI = SHARED / "data" / "wsi"


def tissue(height: int = 90, width: int = 130) -> np.ndarray:
    """Smooth colours, so that lossy codecs stay close, with noise, so that compression cannot empty a strip."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([120 + 80 * np.sin(x / 15), 100 + 60 * np.cos(y / 11), 90 + x / 2], axis=-1)
    return np.clip(smooth + np.random.default_rng(0).normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


IMAGE = tissue()


def write_tiff(path: Path, image: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, image, **{"photometric": "rgb", "metadata": None, **options})
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_field(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


TIFF_KINDS = {
    "uncompressed": {},
    "strips": {"rowsperstrip": 16},
    "tiles": {"tile": (64, 64)},
    "big": {"bigtiff": True, "rowsperstrip": 16},
    "big endian": {"byteorder": ">"},
    "lzw": {"compression": "lzw", "predictor": True},
    "deflate tiles": {"compression": "deflate", "tile": (64, 64)},
    "planar": {"planarconfig": "separate", "rowsperstrip": 16},
    "jpeg2000 tiles": {"compression": "jpeg2000", "tile": (64, 64)},
}


@pytest.mark.parametrize("kind", TIFF_KINDS)
def test_lossless_tiff_gives_its_pixels(tmp_path, kind):
    image = IMAGE if kind != "planar" else np.moveaxis(IMAGE, -1, 0)
    read = read_field(write_tiff(tmp_path / "no_suffix", image, **TIFF_KINDS[kind]))
    assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable
    np.testing.assert_array_equal(read, IMAGE)


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 16}])
@pytest.mark.parametrize("colours", ["RGB", "YCBCR"])
def test_jpeg_in_tiff_has_the_right_colours(tmp_path, options, colours):
    arguments = {"level": 98, "outcolorspace": colours}
    path = write_tiff(tmp_path / "a.tif", IMAGE, compression="jpeg", compressionargs=arguments, **options)
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].photometric.name == colours
    assert np.abs(read_field(path).astype(int) - IMAGE).mean() < 4


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiff_of_another_writer(tmp_path, compression):
    path = tmp_path / "a.tif"
    quality = {"quality": 95} if compression == "jpeg" else {}
    Image.fromarray(IMAGE).save(path, compression=compression, **quality)  # by libtiff
    assert np.abs(read_field(path).astype(int) - IMAGE).mean() < (4 if compression == "jpeg" else 1e-9)


def test_jpeg2000_in_ycbcr_is_refused(tmp_path):
    path = write_tiff(tmp_path / "a.svs", IMAGE, compression="jpeg2000", tile=(64, 64))
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["Compression"].overwrite(33003)
    refused(path, "JP2000_YCBC")


def test_jpeg_in_ycbcr_with_a_fourth_sample_is_refused(tmp_path):
    rgba = np.dstack([IMAGE, IMAGE[..., :1]])
    path = write_tiff(tmp_path / "a.tif", rgba, compression="deflate", extrasamples=["unassalpha"])
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["PhotometricInterpretation"].overwrite(6)
        tif.pages[0].tags["Compression"].overwrite(7)
    refused(path, "YCBCR")


@pytest.mark.parametrize("format_", ["PNG", "BMP", "JPEG"])
def test_pictures_are_known_by_their_bytes(tmp_path, format_):
    path = tmp_path / "wrong_name.tif"
    Image.fromarray(IMAGE).save(path, format=format_)
    read = read_field(path)
    assert read.flags.c_contiguous and read.flags.writeable
    np.testing.assert_array_equal(read, np.asarray(Image.open(path)))


@pytest.mark.parametrize("kind", [*TIFF_KINDS, "jpeg tiles", "png", "bmp", "jpeg", "progressive"])
def test_truncation_anywhere_is_found_or_harmless(tmp_path, kind):
    path = tmp_path / "image"
    if kind == "jpeg tiles":
        write_tiff(path, IMAGE, compression="jpeg", tile=(64, 64))
    elif kind in TIFF_KINDS:
        write_tiff(path, IMAGE if kind != "planar" else np.moveaxis(IMAGE, -1, 0), **TIFF_KINDS[kind])
    elif kind == "progressive":
        Image.fromarray(IMAGE).save(path, format="JPEG", progressive=True)
    else:
        Image.fromarray(IMAGE).save(path, format=kind)
    whole, pixels = path.read_bytes(), read_field(path)
    found = 0
    lengths = [*range(0, len(whole), max(len(whole) // 60, 1)), *range(len(whole) - 12, len(whole))]
    for length in lengths:
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_field(path), pixels)
        except InputError as error:
            assert str(path) in str(error)
            found += 1
    assert found >= 50


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_whose_rest_was_never_written_is_broken(tmp_path, progressive):
    """What an interrupted download into a file of full size leaves; libjpeg decodes it without a word."""
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x9286] = "a thumbnail ends with \xff\xd9 too".encode("latin-1")
    Image.fromarray(IMAGE).save(path, progressive=progressive, exif=exif)
    whole = path.read_bytes()
    assert whole.count(b"\xff\xd9") == 2
    read_field(path)
    path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    refused(path, "truncated")


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(IMAGE).save(path)
    pixels = read_field(path)
    path.write_bytes(path.read_bytes() + b"maker's notes" + bytes(100))
    np.testing.assert_array_equal(read_field(path), pixels)


@pytest.mark.parametrize("level", [0, 6])
def test_changed_byte_in_png_is_found(tmp_path, level):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path, compress_level=level)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    refused(path)


def test_tiff_with_too_few_strips_is_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tif", IMAGE, rowsperstrip=30, compression="deflate")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name in ("StripOffsets", "StripByteCounts"):
            tag = tif.pages[0].tags[name]
            tag.overwrite(tag.value[:2])
    refused(path, "truncated")


def test_strips_never_written_are_refused_and_missing_tiles_are_white(tmp_path):
    for layout, name in (({"rowsperstrip": 30}, "StripByteCounts"), ({"tile": (64, 64)}, "TileByteCounts")):
        path = write_tiff(tmp_path / "a.tif", IMAGE, compression="deflate", **layout)
        with tifffile.TiffFile(path, mode="r+b") as tif:
            for tag_name in (name, name.replace("ByteCounts", "Offsets")):
                tag = tif.pages[0].tags[tag_name]
                tag.overwrite((0, *tag.value[1:]))
        if "tile" in layout:
            read = read_field(path)
            assert (read[:64, :64] == 255).all()
            np.testing.assert_array_equal(read[64:], IMAGE[64:])
        else:
            refused(path, "incomplete")


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_alpha_is_dropped_and_padding_is_white(tmp_path, kind):
    rgba = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)])
    rgba[:10] = 0  # padding of a slide
    rgba[10:20, :, 3] = 0  # transparent, but with colours of tissue
    rgba[20:30, :, :3] = 0  # black and opaque
    path = tmp_path / f"a.{kind}"
    if kind == "tif":
        write_tiff(path, rgba, extrasamples=["unassalpha"])
    else:
        Image.fromarray(rgba).save(path)
    read = read_field(path)
    assert read.shape == IMAGE.shape
    assert (read[:10] == 255).all() and (read[20:30] == 0).all()
    np.testing.assert_array_equal(read[10:20], IMAGE[10:20])
    np.testing.assert_array_equal(read[30:], IMAGE[30:])


@pytest.mark.parametrize("top", [4095, 65535, 3000])
@pytest.mark.parametrize("kind", ["tif", "png", "gray"])
def test_sixteen_bits_are_scaled_by_their_maximum(tmp_path, top, kind, caplog):
    deep = (np.arange(60, dtype=np.uint16).reshape(4, 5, 3).astype(float) * top / 59).round().astype(np.uint16)
    path = tmp_path / "a"
    if kind == "png":
        path.write_bytes(imagecodecs.png_encode(deep))
    elif kind == "tif":
        write_tiff(path, deep)
    else:
        deep = deep[..., 2]
        write_tiff(path, deep, photometric="minisblack")
        deep = np.dstack([deep] * 3)
    read = read_field(path)
    assert read.dtype == np.uint8 and read.max() == 255
    np.testing.assert_allclose(read, deep.astype(float) * 255 / top, atol=0.51)
    assert str(path) in caplog.text and str(top) in caplog.text


def test_sixteen_bit_image_of_zeros(tmp_path):
    assert (read_field(write_tiff(tmp_path / "a", np.zeros((5, 5, 3), np.uint16))) == 0).all()


def test_gray_white_is_zero_bilevel_and_palette(tmp_path):
    gray = IMAGE[..., 0]
    three = np.dstack([gray] * 3)
    path = tmp_path / "a"
    np.testing.assert_array_equal(read_field(write_tiff(path, gray, photometric="minisblack")), three)
    np.testing.assert_array_equal(read_field(write_tiff(path, 255 - gray, photometric="miniswhite")), three)
    bits = gray > 120
    expected = np.dstack([bits * 255] * 3)
    np.testing.assert_array_equal(read_field(write_tiff(path, bits, photometric="minisblack")), expected)
    for mode, pixels in (("L", three), ("1", expected)):
        Image.fromarray(gray if mode == "L" else bits).save(path, format="PNG")
        np.testing.assert_array_equal(read_field(path), pixels)
    colours = np.random.default_rng(1).integers(0, 256, (256, 3))
    for colormap in (colours.T * 257, colours.T):
        write_tiff(path, gray, photometric="palette", colormap=colormap.astype(np.uint16))
        np.testing.assert_array_equal(read_field(path), colours[gray])
    palette = Image.fromarray(IMAGE).quantize(40)
    palette.save(path, format="PNG")
    np.testing.assert_array_equal(read_field(path), np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg_is_converted(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(IMAGE).convert("CMYK").save(path, quality=95)
    assert np.abs(read_field(path).astype(int) - IMAGE).mean() < 6


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (IMAGE.astype(np.float32), {}),
        (IMAGE.astype(np.int16), {}),
        (IMAGE.astype(np.uint32), {}),
        (np.dstack([IMAGE, IMAGE]), {"extrasamples": [0, 0, 0]}),
        (np.dstack([IMAGE, IMAGE[..., :1]]), {"photometric": "separated"}),
        (IMAGE, {"photometric": "ycbcr"}),
        (IMAGE, {"photometric": "cielab"}),
    ],
)
def test_tiff_that_cannot_be_shown_as_rgb_is_refused(tmp_path, image, options):
    refused(write_tiff(tmp_path / "a.tif", image, **options), "8-bit RGB")


def test_several_images_in_a_tiff_are_refused_and_reduced_copies_are_not_the_field(tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.stack([IMAGE, IMAGE]))
    refused(path, "several images")
    tifffile.imwrite(path, np.zeros((3, 40, 50), np.uint8), photometric="minisblack")  # planes as pages: not gray
    refused(path, "several images")
    with tifffile.TiffWriter(path) as tif:
        tif.write(IMAGE[::4, ::4], photometric="rgb", subfiletype=1)
        tif.write(IMAGE, photometric="rgb")
    np.testing.assert_array_equal(read_field(path), IMAGE)


def test_orientation_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE).save(path, exif=exif)
    assert read_field(path).shape == IMAGE.shape
    write_tiff(path, IMAGE, extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_array_equal(read_field(path), IMAGE)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb"
    path.write_bytes(png_of_size(40000, 30000))
    refused(path, "40000 x 30000", "MAX_PIXELS")
    write_tiff(path, IMAGE)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name in ("ImageWidth", "ImageLength"):
            tif.pages[0].tags[name].overwrite(60000)
    refused(path, "60000 x 60000", "MAX_PIXELS")
    Image.fromarray(IMAGE).save(path, format="JPEG")
    monkeypatch.setattr(fields, "MAX_PIXELS", IMAGE.shape[0] * IMAGE.shape[1] - 1)
    refused(path, "MAX_PIXELS")


def test_pillow_limits_do_not_interfere(tmp_path, recwarn):
    """A 200-megapixel field is above Pillow's own limit of 179; reading it must fail only for want of data."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    path = tmp_path / "a.png"
    path.write_bytes(png_of_size(20000, 10000))
    with pytest.raises(InputError) as caught:
        read_field(path)
    assert "truncated" in str(caught.value) or "broken" in str(caught.value)
    assert not recwarn.list


def test_what_is_no_image_is_refused(tmp_path):
    refused(tmp_path / "missing.png", "No such file")
    refused(tmp_path, "directory" if sys.platform != "win32" else "denied")
    path = tmp_path / "a.png"
    for content in (b"", b"BMI of the patients, a text that is longer than a header", b"II*\0", b"\xff\xd8\xff"):
        path.write_bytes(content)
        refused(path)


def test_paths_of_every_alphabet(tmp_path):
    names = ["Geschwür 腫瘍.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"gewebe_\xe4.tif"))  # Latin-1 bytes
    for name in names:
        path = tmp_path / name
        if path.suffix == ".png":
            Image.fromarray(IMAGE).save(path)
        else:
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, IMAGE, photometric="rgb")
            path.write_bytes(buffer.getvalue())
        np.testing.assert_array_equal(read_field(path), IMAGE)
        assert find_images([path]) == [path]


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((40000, 40000), "CENTIMETER", 0.25),
        ((101600, 101600), "INCH", 0.25),
        ((40000, 40000), "NONE", None),
        ((72, 72), "INCH", None),
        ((400000, 400000), "CENTIMETER", None),
        ((40000, 20000), "CENTIMETER", None),
        ((0, 0), "CENTIMETER", None),
    ],
)
def test_resolution_of_a_tiff(tmp_path, resolution, unit, expected):
    path = write_tiff(tmp_path / "a.tif", IMAGE, resolution=resolution, resolutionunit=unit)
    found = read_um_per_px(path)
    assert found == (pytest.approx(expected) if expected else None)


def test_resolution_of_aperio_and_of_pictures(tmp_path):
    path = tmp_path / "a.svs"
    for text, expected in (("Aperio |AppMag = 20|MPP = 0.499", 0.499), ("Aperio |MPP = 352.8", None)):
        write_tiff(path, IMAGE, description=text, resolution=(40000, 40000), resolutionunit="CENTIMETER")
        assert read_um_per_px(path) == expected
    write_tiff(path, IMAGE)
    assert read_um_per_px(path) is None
    Image.fromarray(IMAGE).save(path, format="JPEG", dpi=(72, 72))
    assert read_um_per_px(path) is None
    path.write_bytes(b"II*\0broken")
    with pytest.raises(InputError, match=r"a\.svs"):
        read_um_per_px(path)


def test_images_in_folders(tmp_path):
    folder = tmp_path / "fields"
    (folder / "deep" / ".cache").mkdir(parents=True)
    for name in ("b.jpg", "deep/a", ".hidden.png", "deep/.cache/c.png"):
        Image.fromarray(IMAGE).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("BM is how a bitmap begins, and this text")
    (folder / "deep" / "empty.TIF").touch()
    expected = [folder / "b.jpg", folder / "deep" / "a", folder / "deep" / "empty.TIF"]
    assert find_images([folder]) == expected
    assert find_images([folder / "deep" / "a", folder, folder / "notes.txt"]) == [*expected, folder / "notes.txt"]


def test_links_in_a_circle_end(tmp_path):
    folder = tmp_path / "fields"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(IMAGE).save(folder / "a.png")
    try:
        for name in ("up", "again"):  # two, so that walking on would take for ever
            (folder / "deep" / name).symlink_to(folder, target_is_directory=True)
        (folder / "same.png").symlink_to(folder / "a.png")
        (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    except OSError:
        pytest.skip("this system makes no links")
    assert find_images([folder, folder / "deep" / ".." / "a.png"]) == [folder / "a.png"]


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_images([tmp_path / "missing"])
    with pytest.raises(InputError, match="no image"):
        find_images([tmp_path])


@pytest.mark.skipif(not WSI.is_dir(), reason="real slides are not here")
def test_real_slides():
    slide = read_field(WSI / "cmu-1-small-region.svs")
    assert slide.shape == (2967, 2220, 3) and slide.mean() > 180
    assert read_um_per_px(WSI / "cmu-1-small-region.svs") == 0.499
    assert read_field(WSI / "boxes.tiff").shape == (250, 300, 3)
    assert read_um_per_px(WSI / "boxes.tiff") is None
    refused(WSI / "unopenable.tiff", "52479")
