"""How long one field of 7215 x 5412 px takes: ours, ours with every candidate scored, and a common detector on tiles.

The field is a mosaic of synthetic fields of make_sample.py, or of --field. Networks have random weights, which cost the
same time as trained ones. Ours is timed with every engine asked for. All in one run and one process, without its start.
Wall time tells what a user waits for on a free machine; CPU time, summed over the threads, also tells on a busy one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dasc.detect.candidates import find_candidates
from dasc.detect.field import scan_field, search_device
from dasc.images.read import read_field
from dasc.model.checkpoint import Detector, load_detector
from dasc.model.engine import PatchEngine
from dasc.model.network import CamNetwork, fold_batch_norms
from dasc.run import pick_device

WIDTH, HEIGHT = 7215, 5412  # a field of MIDOG
TILE = 512  # px of the detector's tiles


NETWORKS = ["tf_efficientnet_lite0:64:32", "resnet18:80:16"]  # backbone, px of a patch, stride
OPTIONS = {"batch_size": 1024, "smallest": 0.05}  # of scan_field


def mosaic(field: str, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A field of these sides in px, of copies of one image or of the synthetic sample's."""
    with tempfile.TemporaryDirectory() as folder:
        if field:
            images = [read_field(Path(field))]
        else:
            command = [ROOT / "pre/make_sample.py", "--out", folder, "--size_px", "1200"]
            subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
            images = [read_field(path) for path in sorted(Path(folder, "images").glob("*"))[:6]]
    wide = np.concatenate(images, axis=1)
    return np.tile(wide, (-(-height // wide.shape[0]), -(-width // wide.shape[1]), 1))[:height, :width].copy()


def detector_of(name: str, per_mm2: float, device: torch.device) -> Detector:
    """A model.pt as it is, or of random weights: backbone:patch size:stride."""
    if name.endswith(".pt"):
        return load_detector(Path(name), device)
    backbone, size, stride = name.split(":")
    return random_detector(backbone, int(size), int(stride), per_mm2, device)


def random_detector(backbone: str, size: int, stride: int, per_mm2: float, device: torch.device) -> Detector:
    """A detector of random weights for patches of `size` px."""
    torch.manual_seed(0)
    network = fold_batch_norms(CamNetwork(backbone, stride).to(device, memory_format=torch.channels_last))
    return Detector(network, size, 0.25, True, per_mm2, merge_um=7.5, views=8, manifest_sha256=None)


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Wall seconds, CPU seconds and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def say(what: str, wall: float, cpu: float, more: str = "") -> None:
    print(f"{what}: {wall:.1f} s, {cpu:.1f} s of CPU{more}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", default="", help="image to make the mosaic of; empty: the synthetic sample")
    parser.add_argument("--um_per_px", type=float, default=0.25)
    parser.add_argument(
        "--networks",
        nargs="+",
        default=NETWORKS,
        help="backbone:patch size:stride, or a model.pt; the first is also timed on every candidate, with torch",
    )
    parser.add_argument(
        "--engines", nargs="+", default=["torch"], choices=["torch", "openvino"], help="that score our patches"
    )
    parser.add_argument("--width", type=int, default=WIDTH, help="of the field, px")
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument(
        "--detector_tiles",
        type=int,
        default=3,
        help="tiles timed; the whole field is extrapolated; 0: ours alone, without every candidate",
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    image = mosaic(args.field, args.width, args.height)
    with tempfile.TemporaryDirectory() as folder:
        tifffile.imwrite(Path(folder, "field.tiff"), image)
        say("reading the field from an uncompressed TIFF", *timed(lambda: read_field(Path(folder, "field.tiff")))[:2])
    wall, cpu, (points, _) = timed(lambda: find_candidates(image, args.um_per_px, None, search_device(device)))
    say("finding and ranking the candidates", wall, cpu, f", {len(points)} of them")
    for name in args.networks:
        runs = [("ours", 3000, engine) for engine in args.engines]
        if name == args.networks[0] and args.detector_tiles:
            runs.append(("every candidate", 1e6, "torch"))
        for what, per_mm2, asked in runs:
            detector = detector_of(name, per_mm2, device)
            of_detector = detector.network, asked, detector.patch_size, 1, detector.first_look
            wall, cpu, engine = timed(lambda: PatchEngine(*of_detector))  # noqa: B023
            network = engine.network_for(image.shape[0] * image.shape[1])
            detector = replace(detector, network=network, first_look=engine.first_look)
            say(f"start of {asked}", wall, cpu)
            scan_field(detector, image[:600, :600], args.um_per_px, **OPTIONS)  # warm
            scan = lambda: scan_field(detector, image, args.um_per_px, **OPTIONS)  # noqa: E731, B023
            say(f"{what}, {name}, {asked}", *timed(scan)[:2])
    if not args.detector_tiles:
        sys.exit()
    detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    detector.to(device).eval()
    tiles = torch.from_numpy(image[:TILE, : TILE * args.detector_tiles]).permute(2, 0, 1).float().div(255).to(device)
    with torch.inference_mode():
        detector([tiles[:, :, :TILE]])
        wall, cpu, _ = timed(lambda: [detector([tile]) for tile in tiles.split(TILE, dim=2)])
    count = -(-args.width // TILE) * -(-args.height // TILE)
    share = count / args.detector_tiles
    more = f" ({args.detector_tiles} of {count} tiles timed, {wall / args.detector_tiles:.2f} s each)"
    say("torchvision's RetinaNet-ResNet50, extrapolated", wall * share, cpu * share, more)
