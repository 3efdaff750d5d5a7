"""What SAME_CORRELATION of NS/weak_mining.py tells apart: copies of real patches, and patches of different slides."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np

from dasc.data.patches import read_patch
from dasc.data.tables import read_patches
from dasc.weak.duplicates import correlations, thumbnail


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)


def halved(image: np.ndarray) -> np.ndarray:
    side = image.shape[0]
    return cv2.resize(cv2.resize(image, (side // 2, side // 2), interpolation=cv2.INTER_AREA), (side, side))


COPIES = {
    "JPEG quality 70": lambda image: jpeg(image, 70),
    "JPEG quality 30": lambda image: jpeg(image, 30),
    "halved and enlarged": halved,
    "15 % and 10 levels lighter": lambda image: np.clip(image * 1.15 + 10, 0, 255).astype(np.uint8),
    "30 % darker": lambda image: (image * 0.7).astype(np.uint8),
    "gamma 1.5": lambda image: (255 * (image / 255) ** 1.5).astype(np.uint8),
    "blurred by 1.5 px": lambda image: cv2.GaussianBlur(image, (0, 0), 1.5),
    "shifted by 1 px": lambda image: np.roll(image, 1, axis=1),
    "shifted by 2 px": lambda image: np.roll(image, 2, axis=1),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, help="patches.csv with the patches of several slides")
    parser.add_argument("--patches", type=int, default=8000, help="compared with --others of other slides")
    parser.add_argument("--others", type=int, default=2000)
    args = parser.parse_args()
    table = read_patches(Path(args.manifest))
    table = table[table["origin"] != "shifted"]
    table = table.sample(min(args.patches, len(table)), random_state=0)
    images = [read_patch(Path(args.manifest).parent / patch) for patch in table["patch"]]
    ours, case = np.array([thumbnail(image) for image in images]), table["case"].to_numpy()
    for name, change in COPIES.items():
        pairs = zip(images[:1500], ours[:1500], strict=True)
        same = [correlations(thumbnail(change(image))[None], own[None])[0] for image, own in pairs]
        print(f"{name}: lowest {min(same):.3f}, median {np.median(same):.3f}")
    best = np.full(len(ours), -1.0)
    for slide in np.unique(case):
        others = ours[: args.others][case[: args.others] != slide]
        best[case == slide] = correlations(ours[case == slide], others)
    print(f"highest with {args.others} patches, those of other slides: median {np.median(best):.3f}, {best.max():.3f}")
