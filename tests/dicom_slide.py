"""A slide in DICOM, written by hand: one file per level, all of one series."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

LONG = ("OB", "SQ")  # kinds whose length has four bytes
SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image
JPEG = "1.2.840.10008.1.2.4.50"
ITEM, ITEM_END, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
NO_LENGTH, NOTHING = b"\xff\xff\xff\xff", b"\0\0\0\0"


def element(group: int, number: int, kind: str, value: str | int | bytes | list[bytes]) -> bytes:
    """One element, explicit kinds, little-endian."""
    if kind in ("US", "UL"):
        value = struct.pack("<H" if kind == "US" else "<I", value)
    elif kind == "SQ":
        value = b"".join(ITEM + struct.pack("<I", len(item)) + item for item in value)
    elif isinstance(value, str):
        value = value.encode()
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    length = b"\0\0" + struct.pack("<I", len(value)) if kind in LONG else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + length + value


def write_dicom(path: Path, image: np.ndarray, series: str, instance: str, um_per_px: float, tile: int = 128) -> None:
    """Write one level (H, W, 3) uint8 in JPEG tiles. Before its series stands a sequence that names another one."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % tile), (0, -width % tile), (0, 0)), constant_values=255)
    frames = []
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            buffer = io.BytesIO()
            Image.fromarray(padded[y : y + tile, x : x + tile]).save(buffer, "JPEG", quality=95, subsampling=0)
            frames.append(buffer.getvalue() + b"\0" * (buffer.tell() % 2))
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", SLIDE) + element(2, 3, "UI", instance)
    meta += element(2, 0x10, "UI", JPEG) + element(2, 0x12, "UI", "1.2.3")
    another = ITEM + NO_LENGTH + element(0x20, 0xE, "UI", "9.9.9") + ITEM_END + NOTHING
    side = f"{um_per_px / 1000:.6f}"
    spacing = element(0x28, 0x9110, "SQ", [element(0x28, 0x30, "DS", f"{side}\\{side}")])
    body = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        element(8, 0x16, "UI", SLIDE),
        element(8, 0x18, "UI", instance),
        element(8, 0x60, "CS", "SM"),
        struct.pack("<HH", 8, 0x1115) + b"SQ\0\0" + NO_LENGTH + another + SEQUENCE_END + NOTHING,
        element(0x20, 0xD, "UI", "1.2.3.1"),
        element(0x20, 0xE, "UI", series),
        element(0x20, 0x9311, "CS", "TILED_FULL"),
        element(0x28, 2, "US", 3),
        element(0x28, 4, "CS", "YBR_FULL_422"),
        element(0x28, 6, "US", 0),
        element(0x28, 8, "IS", str(len(frames))),
        *(element(0x28, number, "US", value) for number, value in ((0x10, tile), (0x11, tile), (0x100, 8))),
        *(element(0x28, number, "US", value) for number, value in ((0x101, 8), (0x102, 7), (0x103, 0))),
        element(0x48, 6, "UL", width),
        element(0x48, 7, "UL", height),
        element(0x5200, 0x9229, "SQ", [spacing]),
    ]
    starts = np.cumsum([0, *(8 + len(frame) for frame in frames[:-1])]).astype("<u4").tobytes()
    pixels = struct.pack("<HH", 0x7FE0, 0x10) + b"OB\0\0" + NO_LENGTH
    pixels += (
        b"".join(ITEM + struct.pack("<I", len(part)) + part for part in (starts, *frames)) + SEQUENCE_END + NOTHING
    )
    group_length = element(2, 0, "UL", len(meta))
    Path(path).write_bytes(bytes(128) + b"DICM" + group_length + meta + b"".join(body) + pixels)
