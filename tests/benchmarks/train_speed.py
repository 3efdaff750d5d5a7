"""How fast stage 2 trains beside the same network on ready random tensors, in one run.

The step of NS/sigle.py (gather, augment, forward, backward, Adam, average) takes turns with a bare step on tensors
that lie ready, so that whatever else the machine does slows both.
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

from dasc.augment import training_view
from dasc.network import SearchNetwork, update_average
from dasc.run import pick_device

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "tf_efficientnet_lite0", "resnet10t"])
    parser.add_argument("--patch_size", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps that are timed")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (4096, 3, args.patch_size, args.patch_size)
    patches = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 2, (len(patches),), generator=generator)
    for backbone in args.backbones:
        network = SearchNetwork(backbone, args.stride).to(device, memory_format=torch.channels_last).train()
        average = copy.deepcopy(network)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        ready = torch.rand(args.batch_size, *shape[1:], device=device).to(memory_format=torch.channels_last)
        ready_labels = labels[: args.batch_size].to(device)

        def step(views, targets, network=network, optimizer=optimizer):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(network(views).float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()  # waits for the device

        times = {"bare": [], "stage 2": []}
        for number in range(args.steps + 2):
            start = time.perf_counter()
            step(ready, ready_labels)
            middle = time.perf_counter()
            batch = torch.randint(len(patches), (args.batch_size,), generator=generator)
            step(training_view(patches[batch].to(device), generator, 0.2, 0.2, 0.8), labels[batch].to(device))
            update_average(average, network, 0.98)
            if number >= 2:  # the first steps set the libraries up
                times["bare"].append(middle - start)
                times["stage 2"].append(time.perf_counter() - middle)
        bare, whole = (args.batch_size / np.median(times[name]) for name in times)
        print(f"{backbone}: bare {bare:.0f} patches/s, stage 2 {whole:.0f} patches/s, ratio {whole / bare:.2f}")
