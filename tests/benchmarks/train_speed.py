"""How fast stages 2 and 8 train beside the same network on ready random tensors, in one run.

The steps of NS/sigle.py and DMU/hard_scl_main.py (gather, augment, forward, losses, backward, Adam, average) take turns
with a bare step on tensors that lie ready, so that whatever else the machine does slows all of them.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from dasc.model.augment import located_view, training_view
from dasc.model.loop import update_ema
from dasc.model.losses import graded_cross_entropy, localisation, subclass_contrastive
from dasc.model.network import CamNetwork
from dasc.run import pick_device

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "tf_efficientnet_lite0", "resnet10t"])
    parser.add_argument("--patch_size", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="rounds of steps that are timed")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (4096, 3, args.patch_size, args.patch_size)
    patches = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 2, (len(patches),), generator=generator)
    grades = torch.randint(0, 4, (len(patches),), generator=generator) / 3
    groups = labels * 4 + torch.randint(0, 4, (len(patches),), generator=generator)
    points_px = torch.rand(len(patches), 2, generator=generator) * (args.patch_size - 1)
    for backbone in args.backbones:
        network = CamNetwork(backbone, args.stride).to(device, memory_format=torch.channels_last).train()
        average = copy.deepcopy(network)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        ready = torch.rand(args.batch_size, *shape[1:], device=device).to(memory_format=torch.channels_last)
        ready_labels = labels[: args.batch_size].to(device)

        def step(loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()  # waits for the device

        def cross_entropy(views, targets, network=network):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                return F.cross_entropy(network(views).float(), targets)

        def bare(batch, ready=ready, ready_labels=ready_labels, loss=cross_entropy, step=step):
            step(loss(ready, ready_labels))

        def stage_2(batch, network=network, average=average, loss=cross_entropy, step=step):
            views = training_view(patches[batch].to(device), generator, 0.2, 0.2, 0.8)
            step(loss(views, labels[batch].to(device)))
            update_ema(average, network, 0.98, 10_000)

        def stage_8(batch, network=network, average=average, step=step):
            shown, points = patches[batch].to(device), points_px[batch].to(device)
            views, points = located_view(shown, points, generator, 0.2, 0.2, 0.8)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                maps = network.features(views)
                cam = network.cam(maps)
            cam, embedding = cam.float(), F.normalize(maps.float().mean(dim=(2, 3)), dim=1)
            targets, hardness, group = (table[batch].to(device) for table in (labels, grades, groups))
            softer = 1 + 0.5 * hardness
            loss = graded_cross_entropy(cam.amax(dim=(2, 3)), targets, hardness, 0.1, 0.7)
            loss = loss + 0.1 * subclass_contrastive(
                embedding, targets, group, 0.1 * softer, 0.1 * softer, 1 / softer, 0.25
            )
            step(loss + 0.1 * localisation(cam[:, 1], points, args.patch_size))
            update_ema(average, network, 0.98, 10_000)

        times = {bare: [], stage_2: [], stage_8: []}
        for number in range(args.steps + 2):
            for kind, seconds in times.items():
                batch = torch.randint(len(patches), (args.batch_size,), generator=generator)
                start = time.perf_counter()
                kind(batch)
                if number >= 2:  # the first steps set the libraries up
                    seconds.append(time.perf_counter() - start)
        rates = {kind.__name__: args.batch_size / np.median(seconds) for kind, seconds in times.items()}
        ratios = {name: f"{rate:.0f} patches/s ({rate / rates['bare']:.2f})" for name, rate in rates.items()}
        print(f"{backbone}: {', '.join(f'{name} {text}' for name, text in ratios.items())}", flush=True)
