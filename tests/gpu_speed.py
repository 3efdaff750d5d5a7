"""How fast a GPU is: a field, a slide, the training steps; and what takes the time of each."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
import torch
from pipeline import ROOT, succeed

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import predict_speed
import slide_memory
import train_speed

import dasc.detect.candidates
import dasc.detect.cutter
import dasc.detect.field
import dasc.detect.image
import dasc.detect.slide
import dasc.images.parts
import dasc.report.outputs
import dasc.report.page
from dasc.detect.field import scan_field
from dasc.detect.tiles import Tile
from dasc.images.read import read_field
from dasc.images.slides import Slide
from dasc.model.checkpoint import Detector

NO_GPU = "not run on a GPU"
KERNELS = 12  # that took the longest are named
UM_PER_PX = 0.25
FIELD_PARTS = {  # what is timed: where it stands; a part may hold those after it
    "candidates": (dasc.detect.field, "find_candidates"),
    "candidates: padding, on the CPU": (dasc.detect.candidates, "_find_padding"),
    "candidates: filters": (dasc.detect.candidates, "_measure"),
    "first look": (dasc.detect.field, "candidates_of"),
    "first look: network": (dasc.detect.candidates, "odds_map"),
    "stain: estimate": (dasc.detect.field, "tissue_density"),
    "upload": (dasc.detect.field, "PatchCutter"),
    "both looks": (dasc.detect.field, "_log_odds_at"),
    "both looks: cutting": (dasc.detect.cutter.PatchCutter, "cut_tensor"),
    "both looks: network": (dasc.detect.field, "log_odds"),
    "merging": (dasc.detect.field, "merge"),
}
SLIDE_PARTS = {  # seconds of all threads together
    "hash of the file": (dasc.images.parts, "content_sha256"),
    "overview and tissue": (dasc.detect.image, "look_over"),
    "survey": (dasc.detect.slide, "survey_slide"),
    "reading regions, overview included": (Slide, "read_region"),
    "candidates": (Tile, "candidates"),
    "first look": (Tile, "candidates_of"),
    "stain and cutting": (Tile, "patches"),
    "network": (dasc.detect.slide, "log_odds"),
    "files of the image": (dasc.report.outputs, "write_image"),
    "report": (dasc.report.page, "report_entry"),
}


def goal(reached: bool, device: torch.device) -> bool | str:
    """Whether a goal for a GPU is reached."""
    return reached if device.type == "cuda" else NO_GPU


@contextlib.contextmanager
def profiled(parts: dict[str, tuple[Any, str]], device: torch.device | None) -> Iterator[dict[str, dict]]:
    """Seconds and calls of each part within the block; a device is waited for at the end of each where one is given."""
    found = {name: {"seconds": 0.0, "calls": 0} for name in parts}
    lock, wholes = threading.Lock(), {name: getattr(*place) for name, place in parts.items()}

    def timed(name: str):
        whole, place = wholes[name], found[name]

        @functools.wraps(whole, updated=())
        def work(*args, **kwargs):
            start = time.perf_counter()
            result = whole(*args, **kwargs)
            if device is not None:
                train_speed.wait_for(device)
            with lock:
                place["seconds"] += time.perf_counter() - start
                place["calls"] += 1
            return result

        return work

    for name, (place, attribute) in parts.items():
        setattr(place, attribute, timed(name))
    try:
        yield found
    finally:
        for name, (place, attribute) in parts.items():
            setattr(place, attribute, wholes[name])
        for one in found.values():
            one["seconds"] = round(one["seconds"], 4)


def time_field(
    detectors: dict[str, Detector], image: np.ndarray, device: torch.device, folder: Path, rounds: int
) -> dict:
    """Seconds to read a field from an uncompressed TIFF and scan it by each detector; the fastest round counts."""
    path = folder / "large.tiff"
    tifffile.imwrite(path, image)
    facts: dict[str, Any] = {"width": image.shape[1], "height": image.shape[0], "goal_s": 0.3}
    for name, detector in detectors.items():
        scan = functools.partial(scan_field, detector, um_per_px=UM_PER_PX, **predict_speed.OPTIONS)
        scan(image)  # warm
        times = []
        for _ in range(rounds):
            read_s, _, field = predict_speed.timed(lambda: read_field(path))
            scan_s, _, found = predict_speed.timed(lambda field=field, scan=scan: scan(field))
            times.append((read_s + scan_s, read_s, scan_s))
        whole, read_s, scan_s = min(times)
        with profiled(FIELD_PARTS, device) as parts:
            scan(image)
        facts[name] = {
            "seconds": round(whole, 4),
            "reading_s": round(read_s, 4),
            "scanning_s": round(scan_s, 4),
            "goal_reached": goal(whole <= facts["goal_s"], device),
            "detections": len(found),
            "profile": parts,
        }
    return facts


def name_kernels(detector: Detector, image: np.ndarray, device: torch.device) -> dict:
    """The kernels and copies of a device that took the longest in one field, in ms."""
    from torch.profiler import ProfilerActivity, profile

    scan_field(detector, image, UM_PER_PX, **predict_speed.OPTIONS)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as whole:
        scan_field(detector, image, UM_PER_PX, **predict_speed.OPTIONS)
        train_speed.wait_for(device)
    rows = sorted(whole.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key[:80]: [round(row.self_device_time_total / 1000, 2), row.count] for row in rows[:KERNELS]}


def time_slide(weights: Path, tile: np.ndarray, device: torch.device, folder: Path, workers: int, **size: int) -> dict:
    """Seconds that predict.py takes for a JPEG slide, its start and imports left out; size: as `write_slide`."""
    path, out = folder / "slide.tiff", folder / "slide"
    slide_memory.write_slide(path, tile=slide_memory.mirrored(tile), **size)
    flags = ["--images", path, "--model_path", weights, "--out", out, "--workers", workers, "--threshold", 0.5]
    flags += ["--whole_px", 1, "--device", device.type]
    start = time.perf_counter()
    with profiled(SLIDE_PARTS, None) as parts:
        succeed("predict.py", *flags)
        train_speed.wait_for(device)
    seconds = time.perf_counter() - start
    counts = pd.read_csv(out / "counts.csv").iloc[0]
    return {
        **size,
        "gigapixels": round(size["width"] * size["height"] / 1e9, 3),
        "mib": round(path.stat().st_size / 2**20, 1),
        "tissue_mm2": round(float(counts["tissue_mm2"]), 2),
        "detections": int(counts["mitoses"]),
        "workers": workers,
        "seconds": round(seconds, 2),
        "goal_s": 60,
        "goal_reached": goal(seconds <= 60, device),
        "profile": parts,
    }


def time_training(device: torch.device, backbones: list[str], **shape: int) -> dict:
    """Patches per second of stages 2 and 8 beside the bare network; shape: as `train_speed.rates`."""
    facts: dict[str, Any] = {**shape, "goal": 0.95}
    for backbone in backbones:
        found = train_speed.rates(backbone, device, **shape)
        shares = {name: round(found[name] / found["bare"], 3) for name in ("stage_2", "stage_8")}
        facts[backbone] = {
            "patches_per_s": {name: round(rate, 1) for name, rate in found.items()},
            "beside_the_bare_network": shares,
            "goal_reached": goal(min(shares.values()) >= facts["goal"], device),
        }
    return facts


def time_subclass_loss(device: torch.device, backbone: str, **shape: int) -> dict:
    """The share of a step of stage 8 that its subclass loss takes; shape: as `train_speed.subclass_share`."""
    found = train_speed.subclass_share(backbone, device, **shape)
    return {"backbone": backbone, **shape, **found, "goal": 0.05, "goal_reached": goal(found["share"] < 0.05, device)}
