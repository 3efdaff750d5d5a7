"""How fast stages 2 and 8 train beside the same network on ready random tensors, in one run.

The steps of NS/sigle.py and DMU/hard_scl_main.py (gather, augment, forward, losses, backward, Adam, average) take turns
with a bare step on tensors that lie ready, so that whatever else the machine does slows all of them. A GPU is waited
for after BLOCK steps, as the scripts let it run ahead.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from dasc.model import loop
from dasc.model.augment import located_view, training_view
from dasc.model.losses import graded_cross_entropy, localisation, subclass_contrastive
from dasc.model.network import CamNetwork
from dasc.model.step import Step
from dasc.model.transfer import gather, resident
from dasc.run import pick_device

PATCHES = 4096  # random ones that the steps draw from
BLOCK = 10  # steps timed together on a GPU; on a CPU one
WARM = 2  # blocks that are not timed: the first ones set the libraries up


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that was put before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Steps:
    """One network with its optimizer, and a step of each kind; a step takes the places (B,) of its patches."""

    def __init__(self, backbone: str, device: torch.device, patch_size: int, batch_size: int, stride: int) -> None:
        torch.manual_seed(0)
        self.device, self.patch_size, self.batch_size = device, patch_size, batch_size
        self.generator = torch.Generator().manual_seed(0)
        shape = (PATCHES, 3, patch_size, patch_size)
        patches = torch.randint(0, 255, shape, dtype=torch.uint8, generator=self.generator)
        labels = torch.randint(0, 2, (PATCHES,), generator=self.generator)
        grades = torch.randint(0, 4, (PATCHES,), generator=self.generator) / 3
        groups = labels * 4 + torch.randint(0, 4, (PATCHES,), generator=self.generator)
        self.learned = [resident(one, device) for one in (patches, labels, grades, groups)]
        self.points_px = torch.rand(PATCHES, 2, generator=self.generator) * (patch_size - 1)
        self.network = CamNetwork(backbone, stride).to(device, memory_format=torch.channels_last).train()
        _, average = loop.averaged(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)
        self.step_bare, self.step_2, self.step_8 = (
            Step(losses, torch.optim.Adam(self.network.parameters(), lr=1e-4), average, 0.98)
            for losses in (self.losses_2, self.losses_2, self.losses_8)
        )
        features = torch.randn(batch_size, self.network.cam_head.in_channels, device=device)
        self.features = features.requires_grad_()
        self.step_alone = Step(self.losses_alone, torch.optim.Adam([self.features], lr=1e-4))
        ready = torch.rand(batch_size, *shape[1:], device=device)
        self.ready = ready.to(memory_format=torch.channels_last), labels[:batch_size].to(device)

    def draw(self) -> torch.Tensor:
        return torch.randint(PATCHES, (self.batch_size,), generator=self.generator)

    def bare(self, batch: torch.Tensor) -> None:
        views, truth = self.ready
        with loop.autocast(self.device):
            loss = F.cross_entropy(self.network(views).float(), truth)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def bare_recorded(self, batch: torch.Tensor) -> None:
        """As `bare`, on a GPU recorded and replayed."""
        self.step_bare(*self.ready)
        self.step_bare.update(1e-4, 10_000)

    def stage_2(self, batch: torch.Tensor) -> None:
        shown, truth = gather(self.learned[:2], batch, self.device)
        self.step_2(training_view(shown, self.generator, 0.2, 0.2, 0.8), truth)
        self.step_2.update(1e-4, 10_000)

    def stage_8(self, batch: torch.Tensor) -> None:
        shown, truth, hardness, group = gather(self.learned, batch, self.device)
        views, points = located_view(shown, self.points_px[batch], self.generator, 0.2, 0.2, 0.8)
        self.step_8(views, points, truth, hardness, group)
        self.step_8.update(1e-4, 10_000)

    def losses_2(self, views, truth):
        with loop.autocast(self.device):
            return [F.cross_entropy(self.network(views).float(), truth)], []

    def losses_8(self, views, points, truth, hardness, group):
        with loop.autocast(self.device):
            maps = self.network.features(views)
            cam = self.network.cam(maps)
        cam, embedding = cam.float(), F.normalize(maps.float().mean(dim=(2, 3)), dim=1)
        graded = graded_cross_entropy(cam.amax(dim=(2, 3)), truth, hardness, 0.1, 0.7)
        contrastive = self.subclass_loss(embedding, truth, hardness, group)
        place = localisation(cam[:, 1], points, self.patch_size)
        return [graded + 0.1 * contrastive + 0.1 * place, graded, contrastive, place], []

    def subclass_loss(self, embedding, truth, hardness, group) -> torch.Tensor:
        softer = 1 + 0.5 * hardness
        return subclass_contrastive(embedding, truth, group, 0.1 * softer, 0.1 * softer, 1 / softer, 0.25)

    def loss_alone(self, batch: torch.Tensor) -> None:
        """The subclass loss of ready features, and its gradient."""
        self.step_alone(*gather(self.learned[1:], batch, self.device))

    def losses_alone(self, truth, hardness, group):
        return [self.subclass_loss(F.normalize(self.features, dim=1), truth, hardness, group)], []


def step_seconds(steps: Steps, kinds: list[Callable], rounds: int) -> list[float]:
    """Median seconds of a step of each kind, the kinds in turn."""
    block = BLOCK if steps.device.type == "cuda" else 1
    times = [[] for _ in kinds]
    for number in range(WARM + rounds):
        for kind, seconds in zip(kinds, times, strict=True):
            batches = [steps.draw() for _ in range(block)]
            wait_for(steps.device)
            start = time.perf_counter()
            for batch in batches:
                kind(batch)
            wait_for(steps.device)
            if number >= WARM:
                seconds.append((time.perf_counter() - start) / block)
    return [float(np.median(seconds)) for seconds in times]


def rates(backbone: str, device: torch.device, patch_size: int, batch_size: int, stride: int, rounds: int) -> dict:
    """Patches per second: bare, on a GPU bare_recorded, stage_2 and stage_8."""
    steps = Steps(backbone, device, patch_size, batch_size, stride)
    recorded = [steps.bare_recorded] if device.type == "cuda" else []
    kinds = [steps.bare, *recorded, steps.stage_2, steps.stage_8]
    seconds = step_seconds(steps, kinds, rounds)
    return {kind.__name__: batch_size / one for kind, one in zip(kinds, seconds, strict=True)}


def subclass_share(
    backbone: str, device: torch.device, patch_size: int, batch_size: int, stride: int, rounds: int
) -> dict:
    """Seconds of a step of stage 8, of the subclass loss with its gradient alone, and their ratio."""
    steps = Steps(backbone, device, patch_size, batch_size, stride)
    whole, alone = step_seconds(steps, [steps.stage_8, steps.loss_alone], rounds)
    return {"step_s": whole, "subclass_loss_s": alone, "share": alone / whole}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "tf_efficientnet_lite0", "resnet10t"])
    parser.add_argument("--patch_size", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="rounds that are timed")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    for backbone in args.backbones:
        found = rates(backbone, device, args.patch_size, args.batch_size, args.stride, args.steps)
        words = [f"{name} {rate:.0f} patches/s ({rate / found['bare']:.2f})" for name, rate in found.items()]
        print(f"{backbone}: {', '.join(words)}", flush=True)
