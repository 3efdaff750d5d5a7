"""What must hold on a GPU: it finds, cuts, scores and trains what a CPU does, up to the stated bounds.

A check takes a `Case` and returns its figures; it raises AssertionError where one is out of bounds.
"""

import contextlib
import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from pipeline import ROOT, fails, succeed
from scipy.spatial import cKDTree

from dasc.detect.candidates import candidates_of, find_candidates, most_in
from dasc.detect.cutter import PatchCutter
from dasc.detect.field import AFTER_FIRST_LOOK_PER_MM2, off_the_edge, scan_field
from dasc.errors import InputError
from dasc.images.stain import normalise_stain
from dasc.judge.metrics import RADIUS_UM
from dasc.model.augment import located_view, training_view
from dasc.model.checkpoint import load_detector, read_checkpoint, save_checkpoint
from dasc.model.inference import log_odds
from dasc.model.loop import LossGuard, autocast, averaged
from dasc.model.network import CamNetwork
from dasc.model.step import Step
from dasc.model.transfer import gather, resident
from dasc.model.views import strong_view, weak_view

WEIGHTS = ROOT / "weights/dasc_mitos.pt"
CPU = torch.device("cpu")
SIDE_PX = 400  # of the part of the field that is scanned with two checkpoints
NEAR_UM = 0.5  # a candidate or detection this near is the same
SAME_CANDIDATES = 0.998  # smallest share of the kept candidates that both devices keep
SCORES_DIFFER = 1e-3  # most that the score of one may differ; scores span some tens
VIEWS_DIFFER = 1e-3  # most that augmented pixels (0..1), and points in px, may differ on average
# bfloat16 has 8 bits. On a CPU the log odds of two fields' candidates differ by 0.09 and 0.13 on average, a twentieth
# of their spread, and 99 % of the probabilities by at most 0.04 and 0.08 (docs/log.md); a GPU is allowed twice that.
ODDS_DIFFER = 0.3
PROBABILITIES_DIFFER = 0.2
CELL_UM, SAME_IN_BFLOAT16 = 2.0, 0.9  # peaks of a first look this near are the same; share that both devices keep
LOSSES_DIFFER, WEIGHTS_DIFFER = 0.05, 0.2  # of recorded and plain steps; sums in another order grow along a training
STRONG, WEAK = 0.1, 0.02  # what one device finds with at least STRONG the other finds with at least WEAK


class Case(NamedTuple):
    """A field (H, W, 3) uint8 of real tissue, its um/px, the device that is tested, and a folder for files."""

    image: np.ndarray
    um_per_px: float
    device: torch.device
    folder: Path


def shared_by(first_px: np.ndarray, second_px: np.ndarray, radius_px: float) -> float:
    """Share of the points (N, 2) and (M, 2) that have one of the others within the radius, the smaller of both."""
    if not len(first_px) or not len(second_px):
        return float(len(first_px) == len(second_px))
    pairs = ((first_px, second_px), (second_px, first_px))
    return float(min((cKDTree(one).query(other)[0] <= radius_px).mean() for one, other in pairs))


def check_search(case: Case) -> dict:
    """The device keeps the candidates of the CPU, with the same scores."""
    here, score_here = find_candidates(case.image, case.um_per_px)
    there, score_there = find_candidates(case.image, case.um_per_px, device=case.device)
    same = shared_by(here, there, NEAR_UM / case.um_per_px)
    place, nearest = cKDTree(there).query(here)
    differ = float(np.abs(score_here - score_there[nearest])[place * case.um_per_px <= NEAR_UM].max())
    assert len(here) > 20 and same >= SAME_CANDIDATES and differ <= SCORES_DIFFER, (len(here), same, differ)
    return {"candidates": len(here), "kept by both": same, "largest difference of a score": differ}


def check_first_look(case: Case) -> dict:
    """The first look of the shipped weights gives nearly the same candidates on the device, in bfloat16 on a GPU."""
    found = {}
    for device in (CPU, case.device):
        first_look = load_detector(WEIGHTS, device).first_look
        points_px, odds = candidates_of(first_look, case.image, case.um_per_px, None)
        most = most_in(case.image[..., 0].size * case.um_per_px**2 / 1e6, AFTER_FIRST_LOOK_PER_MM2)
        found[device] = points_px[:most], odds[:most]
    (here, odds_here), (there, odds_there) = found[CPU], found[case.device]
    same = shared_by(here, there, CELL_UM / case.um_per_px)
    place, nearest = cKDTree(there).query(here)
    differ = float(np.abs(odds_here - odds_there[nearest])[place * case.um_per_px <= CELL_UM].mean())
    assert len(here) >= 8 and same >= SAME_IN_BFLOAT16 and differ <= ODDS_DIFFER, (len(here), same, differ)
    return {"candidates": len(here), "kept by both": same, "mean difference of log odds": differ}


def patches_of(case: Case, device: torch.device) -> torch.Tensor:
    """Patches of the field's candidates, (N, 3, 64, 64) uint8."""
    points_px, _ = find_candidates(case.image, case.um_per_px)
    inside = off_the_edge(points_px, case.image.shape[1], case.image.shape[0], case.um_per_px)
    return PatchCutter(case.image, case.um_per_px, 0.28, 64, device).cut_tensor(points_px[inside])


def check_cutting(case: Case) -> dict:
    """Patches are the same to the byte, and so are rows gathered on the device."""
    here, there = patches_of(case, CPU), patches_of(case, case.device)
    assert torch.equal(there.cpu(), here)
    order = torch.randperm(len(here), generator=torch.Generator().manual_seed(0))
    for table in (here, resident(here, case.device)):
        assert torch.equal(gather([table], order, case.device)[0].cpu(), here[order])
    return {"patches": len(here)}


def check_views(case: Case) -> dict:
    """Augmented views of one seed are the same on every device, and so are the points moved with them."""
    patches, facts = patches_of(case, CPU)[:64], {}
    points_px = torch.full((len(patches), 2), 30.0)
    views = {
        "training": lambda shown, draws: training_view(shown, draws, 0.2, 0.2, 0.8),
        "weak": weak_view,
        "strong": strong_view,
        "points": lambda shown, draws: located_view(shown, points_px, draws, 0.2, 0.2, 0.8)[1],
    }
    for name, view in views.items():
        here, there = (
            view(patches.to(device), torch.Generator().manual_seed(0)).cpu() for device in (CPU, case.device)
        )
        facts[name] = float((here - there).abs().mean())
        assert facts[name] <= VIEWS_DIFFER, (name, facts)
    return facts


def check_bfloat16(case: Case) -> dict:
    """Log odds in bfloat16 (on a CPU asked for here) are near those in float32, and so are the detections."""
    network = {device: load_detector(WEIGHTS, device) for device in {CPU, case.device}}
    patches = patches_of(case._replace(image=normalise_stain(case.image)), CPU)
    here = log_odds(network[CPU].network, patches, 256)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.device.type == "cpu"), torch.inference_mode():
        there = scores_of(network[case.device].network, patches, case.device)
    odds = float((here - there).abs().mean())
    probabilities = float((torch.sigmoid(here) - torch.sigmoid(there)).abs().quantile(0.99))
    found = {
        device: scan_field(detector, case.image, case.um_per_px, batch_size=256, smallest=WEAK)
        for device, detector in network.items()
    }
    missed, strong = 0, 0
    for one, other in ((CPU, case.device), (case.device, CPU)):
        sure_px = found[one].loc[found[one]["probability"] >= STRONG, ["x_px", "y_px"]].to_numpy()
        weak_px = found[other][["x_px", "y_px"]].to_numpy().reshape(-1, 2)
        near = cKDTree(weak_px).query(sure_px)[0] if len(weak_px) and len(sure_px) else np.full(len(sure_px), np.inf)
        missed, strong = missed + int((near > RADIUS_UM / case.um_per_px).sum()), strong + len(sure_px)
    facts = {"mean difference of log odds": odds, "99 % of the probabilities differ at most": probabilities}
    facts |= {"detections of both": strong, "missed by the other": missed}
    assert odds <= ODDS_DIFFER and probabilities <= PROBABILITIES_DIFFER and not missed, facts
    return facts


def scores_of(network, patches: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Log odds as `log_odds`; on a CPU in this thread, which alone has the context of its caller."""
    if device.type != "cpu":
        return log_odds(network, patches, 256)
    logits = torch.cat([network(part.float() / 255).float() for part in patches.split(64)])
    return logits[:, 1] - logits[:, 0]


def check_guard(case: Case) -> dict:
    """A loss that is not finite is seen before the weights move."""
    guard, passed = LossGuard(3, 10), []
    weight = torch.ones(4, device=case.device, requires_grad=True)
    step = Step(lambda factor: ([(weight * factor).sum()], []), torch.optim.Adam([weight], lr=0.1))
    for factor in (1.0, math.nan, math.inf, 1.0, math.inf, 1.0):  # the last three are recorded
        (loss,), _ = step(torch.tensor(factor, device=case.device))
        passed.append(guard.passes_over(loss, 0))
        if not passed[-1]:
            step.update(0.1)
    assert passed == [False, True, True, False, True, False] and torch.isfinite(weight).all()
    with contextlib.suppress(InputError):
        for _ in range(3):
            guard.passes_over(float("nan"), 0)
        raise AssertionError("three losses in a row that are not finite went through")
    return {}


def check_recorded(case: Case) -> dict:
    """Steps that a device records and replays train as plain ones do; losses of two sizes of batch in turn."""
    torch.manual_seed(0)
    network = CamNetwork("resnet10t", 16).to(case.device, memory_format=torch.channels_last).train()
    sizes = [32] * 6 + [24] * 6 + [32, 24, 8, 32, 24]
    patches = patches_of(case, CPU)[:8].repeat(4, 1, 1, 1).to(case.device)
    histories, weights = [], []
    for records in (True, False):
        one = copy.deepcopy(network)
        ema, average = averaged(one)

        def losses(views, truth, one=one):
            with autocast(case.device):
                return [F.cross_entropy(one(views).float(), truth)], []

        step = Step(losses, torch.optim.Adam(one.parameters(), lr=1e-4), average, 0.9)
        step.records &= records
        histories.append([])
        generator = torch.Generator().manual_seed(0)
        for number, size in enumerate(sizes):
            views = training_view(patches[:size], generator, 0.2, 0.2, 0.8)
            (loss,), _ = step(views, torch.arange(size, device=case.device) % 2)
            histories[-1].append(loss)
            step.update(1e-4 / (1 + number), number)
        weights.append(all_of(ema))
        if case.device.type == "cuda" and records:
            assert len(step.recordings) == 2, step.plain
    differ = float(np.abs(np.subtract(*histories)).max())
    moved = float((weights[0] - weights[1]).norm() / (weights[0] - all_of(network)).norm())
    assert differ <= LOSSES_DIFFER and moved <= WEIGHTS_DIFFER, (differ, moved, histories)
    return {"largest difference of the losses": differ, "difference of the averaged weights by their way": moved}


def check_not_recorded(case: Case) -> dict:
    """A network that looks at a value on the way is trained plainly, and others are recorded all the same."""
    weight = torch.ones(4, device=case.device, requires_grad=True)

    def losses(factor):
        return [(weight * factor).sum() * (1.0 if float(factor) > 0 else -1.0)], []

    step = Step(losses, torch.optim.Adam([weight], lr=0.1))
    history = []
    for factor in (1.0, -1.0, 1.0, -1.0, 1.0, -1.0):
        (loss,), _ = step(torch.tensor(factor, device=case.device))
        step.update(0.1)
        history.append(loss)
    assert not step.records and np.all(np.diff(history) < 0), history
    return check_recorded(case)


def all_of(network: torch.nn.Module) -> torch.Tensor:
    """All weights of a network, (N,)."""
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def check_checkpoint(case: Case) -> dict:
    """A checkpoint that the device wrote is read where there is no GPU, and finds the same to the byte."""
    content = read_checkpoint(WEIGHTS)
    for part in (content, content["first_look"]):
        part["model"] = {name: tensor.to(case.device) for name, tensor in part["model"].items()}
    written = case.folder / "model.pt"
    save_checkpoint(written, content)
    tifffile.imwrite(case.folder / "field.tiff", case.image[:SIDE_PX, :SIDE_PX])
    flags = ["--images", case.folder / "field.tiff", "--um_per_px", case.um_per_px, "--device", "cpu"]
    flags += ["--report", "False", "--threshold", 0.5, "--smallest", 0, "--views", 1]
    here, there = (["--model_path", model, "--out", case.folder / model.stem] for model in (WEIGHTS, written))
    succeed("predict.py", *flags, *here)
    if case.device.type == "cuda":
        command = [sys.executable, ROOT / "predict.py", *flags, *there]
        blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, command)), env=blind, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        succeed("predict.py", *flags, *there)
    found = [(case.folder / model.stem / "detections.csv").read_bytes() for model in (WEIGHTS, written)]
    rows = found[0].count(b"\n") - 1
    assert rows > 2 and found[0] == found[1], (rows, "other detections")
    return {"detections": rows}


@contextlib.contextmanager
def little_memory(device: torch.device, more_bytes: int):
    """The device with only so much memory beside what is in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + more_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def check_memory_full(case: Case) -> dict:
    """Where the memory is full the batch is halved and the scores stay; training stops with advice."""
    detector = load_detector(WEIGHTS, case.device)
    patches = patches_of(case, CPU)[:1].expand(4096, -1, -1, -1).contiguous()
    whole = log_odds(detector.network, patches, 64)
    with little_memory(case.device, 256 * 2**20):
        halved = log_odds(detector.network, patches, len(patches))
    differ = float((whole - halved).abs().max())
    assert differ <= ODDS_DIFFER, differ
    manifest = case.folder / "patches/patches.csv"
    light = ["--backbone", "resnet10t", "--pretrained", "False", "--device", "cuda", "--manifest", manifest]
    with little_memory(case.device, 2**20):
        fails("NS/sigle.py", *light, "--out", case.folder / "NS", says="lower --batch_size")
    return {"largest difference of log odds": differ}


CHECKS = {
    "search": check_search,
    "first look": check_first_look,
    "cutting": check_cutting,
    "views": check_views,
    "bfloat16": check_bfloat16,
    "guard": check_guard,
    "recorded steps": check_recorded,
    "steps that cannot be recorded": check_not_recorded,
    "checkpoint": check_checkpoint,
    "memory full": check_memory_full,
}
NEEDS_CUDA = ("steps that cannot be recorded", "memory full")
