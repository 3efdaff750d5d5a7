"""Images as they come from scanners, archives and interrupted downloads: written well, and broken in known ways."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image


def tissue(height: int = 90, width: int = 120) -> np.ndarray:
    """Smooth colours with noise, so that compression cannot empty a strip; the brightest value is 255."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([150 + 80 * np.sin(x / 15), 120 + 60 * np.cos(y / 11), 130 + x / 2], axis=-1)
    image = np.clip(smooth + np.random.default_rng(0).normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    image[0, 0] = 255
    return image


def tiff(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **{"photometric": "rgb", "metadata": None, **options})
    return buffer.getvalue()


def picture(image: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def first_tile(path: Path, tile: bytes | None = None) -> None:
    """Put other data in the place of a TIFF's first tile; None: its own, whose second half was never written."""
    whole = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        start, size = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    if tile is None:
        whole[start + size // 2 : start + size] = bytes(size - size // 2)
        path.write_bytes(whole)
        return
    path.write_bytes(whole + tile)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for name, value in (("TileOffsets", len(whole)), ("TileByteCounts", len(tile))):
            tag = tif.pages[0].tags[name]
            tag.overwrite((value, *tag.value[1:]) if isinstance(tag.value, tuple) and len(tag.value) > 1 else value)


def write_broken(folder: Path) -> dict[str, str]:
    """Files that show no right pixels: name and what the error must say of it."""
    image = tissue()
    tiles = {"tile": (64, 64)}
    contents = {
        "truncated.tif": (half(tiff(image, rowsperstrip=16)), "truncated TIFF"),
        "truncated_lzw.tif": (half(tiff(image, compression="lzw", rowsperstrip=16)), "truncated TIFF"),
        "truncated.jpg": (half(picture(image, "JPEG")), "truncated JPEG"),
        "truncated.png": (half(picture(image, "PNG")), "cannot be read"),
        "float.tif": (tiff(image.astype(np.float32)), "save it as 8-bit RGB"),
        "cmyk.tif": (tiff(np.dstack([image, image[..., :1]]), photometric="separated"), "save it as 8-bit RGB"),
        "bomb.png": (png_of_size(40_000, 30_000), "40000 x 30000 pixels is more than"),
        "jpeg2000.png": (imagecodecs.jpeg2k_encode(image, level=0, codecformat="jp2"), "not a TIFF, PNG, JPEG or BMP"),
        "empty.tif": (b"", "cannot be read"),
    }
    says = {}
    for name, (data, words) in contents.items():
        (folder / name).write_bytes(data)
        says[name] = words
    for kind in ("jpeg", "jpeg2000"):
        path = folder / f"unwritten_{kind}.tif"
        path.write_bytes(tiff(image, compression=kind, **tiles))
        first_tile(path)
        says[path.name] = f"truncated {kind.upper()}"
    bombs = {"jpeg": imagecodecs.jpeg8_encode, "jpeg2000": imagecodecs.jpeg2k_encode}
    for kind, encode in bombs.items():
        path = folder / f"bomb_{kind}.tif"
        path.write_bytes(tiff(image, compression=kind, **tiles))
        options = {"codecformat": "j2k"} if kind == "jpeg2000" else {}
        first_tile(path, encode(np.zeros((200, 300, 3), np.uint8), level=80, **options))
        says[path.name] = "a strip or tile of 300 x 200 px, expected at most 64 x 64"
    return says


def write_unusual(folder: Path) -> dict[str, np.ndarray]:
    """Files that common readers show wrong: name and their right pixels, (H, W, 3) uint8."""
    image = tissue()
    gray = np.ascontiguousarray(image[..., 0])
    padded = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    padded[:, :20] = 0  # what a scanner never saw
    padded[:, 20:60, 3] = 0
    white = image.copy()
    white[:, :20] = 255
    turned = picture(image, "JPEG", exif=orientation(6), quality=95)
    palette = Image.fromarray(image).quantize(60)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    contents = {
        "plain.tif": (tiff(image), image),
        "jpeg2000.tif": (tiff(image, compression="jpeg2000", tile=(64, 64)), image),
        "alpha.tif": (tiff(padded, extrasamples=["unassalpha"]), white),
        "alpha.png": (picture(padded, "PNG"), white),
        "16bit.tif": (tiff(image.astype(np.uint16) * 257), image),
        "12bit.tif": (tiff((image.astype(float) * 4095 / 255).round().astype(np.uint16)), image),
        "16bit.png": (imagecodecs.png_encode(image.astype(np.uint16) * 257), image),
        "gray.tif": (tiff(gray, photometric="minisblack"), np.dstack([gray] * 3)),
        "palette.png": (buffer.getvalue(), np.asarray(palette.convert("RGB"))),
        "planar.tif": (tiff(np.moveaxis(image, -1, 0), planarconfig="separate"), image),
        "turned.jpg": (turned, imagecodecs.jpeg8_decode(turned)),
        "turned.tif": (tiff(image, extratags=[(274, "H", 1, 6, True)]), image),
        "Geschwür 腫瘍.tif": (tiff(image), image),
        "腫瘍" * 30 + ".tif": (tiff(image), image),  # quoted it would be longer than a file's name may be
        "=1+1.tif": (tiff(image), image),
    }
    right = {}
    for name, (data, pixels) in contents.items():
        (folder / name).write_bytes(data)
        right[name] = pixels
    return right
