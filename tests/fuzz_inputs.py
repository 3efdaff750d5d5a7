"""Sound inputs of every kind that the scripts read, and how fuzz.py breaks their files."""

import csv
import io
import json
import pickle
import random
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image

from dasc.data.tables import CHECKED, HARD, MEMORY, PATCHES, SCL
from dasc.model.network import CamNetwork

BACKBONE = "mobilenetv3_small_050"

Files = dict[str, bytes]

# How files are broken.

TOKENS = ["", " ", "0", "-1", "1", "2", "0.5", "1e309", "-1e-309", "nan", "inf", "NA", "None", "True", "041", "9" * 400]
TOKENS += [
    "99999999999999999999",
    "1.5",
    "\0",
    '"',
    "'",
    ",",
    "\n",
    "\r",
    ";",
    "é",
    "\ufeff",
    "../x",
    "/tmp/x",
    "C:\\x",
]
TOKENS += [
    "a" * 5000,
    "..",
    ".",
    "x/../../y",
    "train",
    "val",
    "test",
    "mitosis",
    "%s",
    "=1+1",
    "<b>",
    "\u202e",
    "\ud800",
]
VALUES = [None, True, 0, 1, 2, -1, 0.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", [], {}, [1], "001"]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes of a binary file, half of them near its start, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            break
        place = rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))
        how = rng.randrange(8)
        if how == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
        elif how == 2:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
            most = 1 << (8 * struct.calcsize(form))
            number = rng.choice((0, 1, most - 1, most // 2, len(data), rng.randrange(most), rng.randrange(65536)))
            data[place : place + struct.calcsize(form)] = struct.pack(form, number % most)
        elif how == 3:
            del data[place:]
        elif how == 4:
            del data[place : place + rng.randrange(1, 64)]
        elif how == 5:
            data[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif how == 6:
            data[place:place] = data[place : place + rng.randrange(1, 256)]
        else:
            other = rng.randrange(len(data))
            data[place : place + 16] = data[other : other + 16]
    return bytes(data)


def change_png(rng: random.Random, data: bytes) -> bytes:
    """As change_bytes, mostly with check sums made right again, without which no decoder looks further."""
    data = change_bytes(rng, data)
    if rng.random() < 0.2:
        return data
    mended, place = bytearray(data), 8
    while place + 12 <= len(mended):
        length = int.from_bytes(mended[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = zlib.crc32(mended[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(mended)


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Cells, rows and characters of a CSV replaced, left out, doubled or moved; now and then its bytes."""
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    rows = [row.split(",") for row in data.decode().split("\n")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rng.choice(rows)
        cell = rng.randrange(len(row))
        how = rng.randrange(8)
        if how < 3:
            row[cell] = rng.choice(TOKENS)
        elif how == 3:
            row[cell] = rng.choice(rng.choice(rows))
        elif how == 4:
            row.insert(cell, rng.choice(TOKENS))
        elif how == 5 and len(row) > 1:
            del row[cell]
        elif how == 6:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        else:
            text = row[cell]
            place = rng.randrange(len(text) + 1)
            row[cell] = text[:place] + rng.choice(TOKENS) + text[place + rng.randrange(2) :]
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def change_value(rng: random.Random, value, others: list):
    """Something inside nested lists and dicts replaced, left out, doubled or renamed."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return rng.choice(others)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.7:
        value[key] = change_value(rng, value[key], others)
    elif rng.random() < 0.5:
        del value[key]
    elif isinstance(value, list):
        value.append(value[key])
    else:
        value[rng.choice([*TOKENS[:20], *keys])] = value.pop(key)
    return value


def change_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    if rng.random() < 0.02:
        return b"[" * rng.choice((500, 100_000))
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = change_value(rng, content, [*VALUES, *TOKENS])
    return json.dumps(content).encode()


class Bomb:
    """What an attacker puts into a pickle: it would write a file."""

    def __reduce__(self):
        return Path.write_text, (Path("bomb"), "went off")


def change_checkpoint(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, data)
    content = torch.load(io.BytesIO(data), weights_only=True)
    others = [*VALUES, torch.zeros(0), torch.full((3,), torch.nan), torch.ones(2, 2, dtype=torch.long), Bomb()]
    for _ in range(rng.choice((1, 1, 2))):
        content = change_value(rng, content, others)
    changed = io.BytesIO()
    if rng.random() < 0.05:
        pickle.dump(content, changed)
    else:
        torch.save(content, changed)
    return changed.getvalue()


# Sound inputs.


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    image = np.random.default_rng(0).normal((200, 150, 200), 12, (height, width, 3))
    for x, y in ((12, 20), (40, 30)):
        cv2.circle(image, (x, y), 5, (90, 60, 140), -1)
    return image.clip(0, 255).astype(np.uint8)


def tiffs() -> list[Files]:
    image, found = picture(), []
    resolved = {"resolution": (40000, 40000), "resolutionunit": 3}
    for options in (
        {},
        {"rowsperstrip": 8, "compression": "lzw", "predictor": True},
        {"rowsperstrip": 16, "compression": "jpeg"},
        {"tile": (16, 16), "compression": "deflate"},
        {"tile": (32, 32), "compression": "jpeg"},
        {"tile": (32, 32), "compression": "jpeg2000"},
        {"tile": (32, 32), "compression": "lzw", "bigtiff": True},
        {"compression": "zstd", "byteorder": ">"},
    ):
        found.append(tiff(image, photometric="rgb", **options, **resolved))
    found.append(tiff(np.moveaxis(image, 2, 0), photometric="rgb", planarconfig="separate"))
    found.append(tiff(image.astype(np.uint16) * 16, photometric="rgb", compression="lzw"))
    found.append(tiff(image[..., 0], photometric="miniswhite"))
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    found.append(tiff(image[..., 0], photometric="palette", colormap=colours))
    found.append(tiff(np.dstack([image, image[..., 0]]), photometric="rgb", extrasamples=["unassalpha"]))
    return [{"image.tif": data} for data in found]


def tiff(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def pyramids() -> list[Files]:
    """Slides of three kinds: Aperio's (read by OpenSlide), and pyramids in pages and in SubIFDs (read by tifffile)."""
    levels, found = [picture(256, 320), picture(128, 160), picture(64, 80)], []
    for compression, description, nested in (
        ("jpeg", "Aperio Image Library v1\n320x256 |AppMag = 40|MPP = 0.25", False),
        ("lzw", "Aperio Image Library v1\n320x256 |MPP = 0.25", False),
        ("jpeg", None, True),
        ("deflate", None, True),
    ):
        file = io.BytesIO()
        options = {"tile": (64, 64), "photometric": "rgb", "compression": compression, "metadata": None}
        with tifffile.TiffWriter(file) as writer:
            writer.write(levels[0], description=description, subifds=2 if nested else 0, **options)
            for level in levels[1:]:
                writer.write(level, subfiletype=1, description=None if nested else description, **options)
        found.append({"slide.tif": file.getvalue()})
    return found


def pictures(name: str, *changes: tuple[str, dict]) -> list[Files]:
    """One picture saved by Pillow in several modes."""
    found = []
    for mode, options in changes:
        file = io.BytesIO()
        Image.fromarray(picture()).convert(mode).save(file, Path(name).suffix[1:].replace("jpg", "jpeg"), **options)
        found.append({name: file.getvalue()})
    return found


def png_bases() -> list[Files]:
    deep = cv2.imencode(".png", picture().astype(np.uint16) * 200)[1].tobytes()
    return [*pictures("a.png", ("RGB", {}), ("RGBA", {}), ("L", {}), ("P", {}), ("1", {})), {"a.png": deep}]


def table(columns, *rows) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue().encode()


PNG = cv2.imencode(".png", picture())[1].tobytes()


def midogs() -> list[Files]:
    images = [{"id": n, "file_name": f"{n:03d}.png", "width": 64, "height": 48} for n in (1, 2, 3)]
    boxes = [{"image_id": n, "category_id": n % 2 + 1, "bbox": [2 * n, 3, 52, 53], "id": n} for n in (1, 2, 3, 1, 2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "mitotic figure"}]}
    pictures = {f"images/{image['file_name']}": PNG for image in images}
    return [{"MIDOG.json": json.dumps(content).encode(), **pictures}]


def geojsons() -> list[Files]:
    """Objects as QuPath writes them, of every kind of geometry."""
    ring = [[4.5, 4.5], [20.5, 4.5], [20.5, 20.5], [4.5, 4.5]]
    spot, spots = {"type": "Point", "coordinates": [9, 9]}, {"type": "MultiPoint", "coordinates": [[9, 9], [12, 9]]}
    whole = {"type": "Polygon", "coordinates": [ring, [[8, 6], [12, 6], [12, 9], [8, 6]]]}
    several = {"type": "MultiPolygon", "coordinates": [[ring], [[[30, 30], [40, 30], [40, 40], [30, 30]]]]}
    line = {"type": "LineString", "coordinates": [[1, 1], [5, 9]]}
    kinds = [{"name": "Mitosis", "color": [1, 2, 3]}, {"names": ["Tumor", "Positive"]}, "Mitosis", None]
    features = []
    for number, geometry in enumerate([spot, spots, whole, several, line]):
        properties = {"objectType": "annotation", "classification": kinds[number % 4], "measurements": {"a": 0.5}}
        features.append({"type": "Feature", "id": str(number), "geometry": geometry, "properties": properties})
    features[2]["nucleusGeometry"] = whole
    features[3]["properties"]["childObjects"] = features[:2]
    collection = {"type": "FeatureCollection", "features": features}
    return [{"a.geojson": json.dumps(content).encode()} for content in (collection, features, features[0])]


def foreign_annotations() -> list[Files]:
    """Annotations of the other programs, as text."""
    at = '<Coordinate Order="0" X="10.5" Y="20.5" /><Coordinate Order="1" X="30.5" Y="12.5" />'
    asap = f'<Annotation Name="1" Type="{{}}" PartOfGroup="Mitosis"><Coordinates>{at}</Coordinates></Annotation>'
    asap = "".join(asap.format(kind) for kind in ("Dot", "PointSet", "Rectangle"))
    vertices = '<Vertex X="1" Y="2" /><Vertex X="9" Y="2" /><Vertex X="9" Y="8" />'
    regions = "".join(f'<Region Type="{n}"><Vertices>{vertices}</Vertices></Region>' for n in range(6))
    table = "Image,Class,Centroid X px,Centroid Y px\na.tif,Mitosis,10.5,20.5\na.tif,,3,4\n"
    layer = f'<Annotations><Annotation Name="Mitosis"><Regions>{regions}</Regions></Annotation></Annotations>'
    texts = [f"<ASAP_Annotations><Annotations>{asap}</Annotations></ASAP_Annotations>", layer, table]
    return [{"a.txt": text.encode()} for text in texts]


def mitos14s() -> list[Files]:
    rows, frame = b"10,20,0.9\n30,12,1.0\n", {"A03/frames/x40/A03_00Aa.png": PNG}
    tables = {"A03/mitosis/A03_00Aa_mitosis.csv": rows, "A03/mitosis/A03_00Aa_not_mitosis.csv": b"5,6,0.2\n"}
    return [{**tables, **frame, "A04/frames/x40/A04_00Aa.png": PNG, "A04/mitosis/A04_00Aa_mitosis.csv": b""}]


def tupac16s() -> list[Files]:
    return [{"mitoses_ground_truth/01/02.csv": b"10,20\n30,12\n", "01/02.png": PNG, "02/01.png": PNG}]


def tables() -> list[Files]:
    fields = [
        ["a", "a.png", "1", "train", 0.25],
        ["b é", "b.png", "041", "val", 0.3],
        ["c", "c/c.png", "NA", "test", 0.25],
    ]
    points = [["a", 10, 20, 1], ["a", 30.5, 12, 0], ["c", 5, 5, 1]]
    names = table(("image", "path", "case", "split", "um_per_px"), *fields)
    places = table(("image", "x_px", "y_px", "label"), *points)
    return [{"fields.csv": names, "annotations.csv": places, **{name: PNG for name in ("a.png", "b.png", "c/c.png")}}]


def cut_folders() -> list[Files]:
    """The tables and patches of stage 1."""
    rows = []
    for number in range(8):
        split, label = ("train", "train", "train", "val")[number % 4], number // 4
        name = f"{split}/{('negative', 'mitosis')[label]}/{number}.png"
        rows.append([name, "a", "041", split, label, "random", 10.5, 20, *([16, 16] if label else ["", ""]), ""])
    patch = cv2.imencode(".png", picture(32, 32))[1].tobytes()
    cut = {"patch_size": 32, "um_per_px": 0.25, "normalise_stain": True, "data_root": "data", "source_px": None}
    base = tables()[0]
    files = {
        "patches.csv": table(PATCHES, *rows),
        "cut.json": json.dumps(cut).encode(),
        **{row[0]: patch for row in rows},
    }
    return [files | {name: base[name] for name in ("fields.csv", "annotations.csv")}]


def difficulty_tables() -> list[Files]:
    rows = [(f"{number}.png", number % 2) for number in range(6)]
    return [
        {
            "memory.csv": table(MEMORY, *[[*row, "random", 3, 2, 1, 4, 2, 0.6, 0.6, 0.6, 0.5, 0.25] for row in rows]),
            "hard.csv": table(
                HARD, *[[*row, *(("hard", 1, 2 / 3), ("clean", "", 0))[row[1]], 0.3, 0.5, 0.25] for row in rows]
            ),
            "checked.csv": table(CHECKED, *[[*row, 1, 4, 3] for row in rows if not row[1]]),
            "SCL.csv": table(SCL, *[[*row, *((1, 2 / 3), (3, 0))[row[1]]] for row in rows]),
        }
    ]


def scans() -> list[Files]:
    survey = {"stain": [[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]], "padding_density": [0.2, 1.5], "lowest_score": -1.0}
    survey |= {"middle": [0.0] * 4, "spread": [1.0] * 4, "second_look": 0.5}
    progress = {"settings": {"views": 8}, "finished": False, "survey": survey, "tiles": 5, "found": [[1.5, 2.0, 0.5]]}
    return [
        {"scan.json": json.dumps(one).encode()} for one in (progress, progress | {"finished": True, "survey": None})
    ]


def checkpoints() -> list[Files]:
    torch.manual_seed(0)
    network = CamNetwork(BACKBONE, 16)
    curve = {"threshold": [0.2, 0.5], "precision": [0.5, 0.8], "recall": [0.9, 0.4], "f1": [0.6, 0.5]}
    config = {"backbone": BACKBONE, "stride": 16, "patch_size": 32, "um_per_px": 0.25, "normalise_stain": True}
    config |= {"classes": ["negative", "mitosis"], "threshold": 0.3, "manifest_sha256": "ab", "temperature": 1.5}
    config |= {"network": "cam", "per_mm2": 3000.0, "merge_um": 7.5, "views": 8, "alignment": None}
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "config": config | {"offset": -1.0, "val_curve": curve}}, file)
    return [{"model.pt": file.getvalue(), "a.png": PNG}]


def backbones() -> list[Files]:
    file = io.BytesIO()
    torch.save(CamNetwork(BACKBONE, 16).backbone.state_dict(), file)
    return [{"weights.pt": file.getvalue()}]
