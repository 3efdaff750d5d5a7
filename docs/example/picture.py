"""Makes docs/detections.jpg, the README's picture, of what predict.py drew on one of the fields in this folder.

Reads results/example/Case_13-01/overlay.png, which `make demo` writes, and so does the command in NOTICE.md.
"""

import sys
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / "results/example/Case_13-01/overlay.png"
PICTURE = ROOT / "docs/detections.jpg"
WIDTH_PX = 1200
QUALITY = 85  # of the JPEG

image = cv2.imread(str(OVERLAY))
if image is None:
    sys.exit(f"error: {OVERLAY}: cannot be read; run make demo first")
height_px = round(image.shape[0] * WIDTH_PX / image.shape[1])
smaller = cv2.resize(image, (WIDTH_PX, height_px), interpolation=cv2.INTER_AREA)
cv2.imwrite(str(PICTURE), smaller, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
print(f"{PICTURE}: {WIDTH_PX} x {height_px} px, {PICTURE.stat().st_size // 1000} kB")
