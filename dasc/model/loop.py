"""What the training loops share: how a network starts, the draws and batches of an epoch, schedules, what is kept.

The loops themselves stand in the scripts. An epoch draws from (seed, epoch) alone: a resumed one draws the same.
"""

import argparse
import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dasc.data.cut import Cut
from dasc.data.pack import MappedPatches
from dasc.data.tables import LABELS
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model import processes
from dasc.model.batch_norm import batch_norms
from dasc.model.checkpoint import Detector, save_checkpoint
from dasc.model.inference import Patches, embed_patches, score_patches
from dasc.model.network import CamNetwork, fold_batch_norms
from dasc.model.start import interpolate, load_initial_weights, read_last
from dasc.model.transfer import gather, resident


def start_network(
    args: argparse.Namespace, device: torch.device, resumed: bool
) -> tuple[CamNetwork, dict[str, Tensor] | None]:
    """The network before its first step, and the weights of --init_weights where they fit the whole network.

    args: seed, backbone, stride, pretrained, init_weights. resumed: its weights come from last.pt, none are fetched.
    """
    torch.manual_seed(args.seed)
    network = CamNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not resumed)
    start = load_initial_weights(network, Path(args.init_weights)) if args.init_weights else None
    return network.to(device, memory_format=torch.channels_last), start


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator that an epoch draws from; what draws from torch's own is seeded alike."""
    torch.manual_seed(seed * 100_003 + epoch)
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def epochs_of(share: float, epochs: int) -> int:
    """A share of the epochs in whole epochs, rounded; at least one epoch comes after it."""
    return min(round(share * epochs), epochs - 1)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of one epoch: as many as there are patches, half of each label, every patch as evenly as can be."""
    halves = []
    for label in LABELS:
        members = torch.nonzero(labels == label).flatten()
        wanted = len(labels) // 2
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-wanted // len(members)))]
        halves.append(torch.cat(rounds)[:wanted])
    both = torch.cat(halves)
    return both[torch.randperm(len(both), generator=generator)]


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """An epoch's order in batches; a last one of a single patch, which batch norm cannot take, joins its neighbour."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


class Rows:
    """Tensors (N, ...) of a training; called with indices (B,) it gives these rows of each on the device.

    patches: those (N, 3, S, S) of which it gives only this process's part, as the first.
    """

    def __init__(self, device: torch.device, *tensors: Tensor, patches: Patches | None = None) -> None:
        self.device, self.patches = device, [] if patches is None else [resident(patches, device)]
        self.tensors = [resident(tensor, device) for tensor in tensors]

    def __call__(self, batch: Tensor) -> list[Tensor]:
        if processes.size() == 1:
            return gather([*self.patches, *self.tensors], batch, self.device)
        own = batch[processes.own(len(batch))]
        return gather(self.patches, own, self.device) + gather(self.tensors, batch, self.device)


class LossGuard:
    """Passes over the steps whose loss is not finite; so many of them in a row end the training.

    nan_steps: steps in a row. steps: of an epoch; a shorter epoch is not gone through in vain.
    """

    def __init__(self, nan_steps: int, steps: int) -> None:
        self.patience = max(1, min(nan_steps, steps))
        self.in_a_row = 0

    def passes_over(self, loss: float, epoch: int) -> bool:
        """Whether this step is left out, its gradients unused. Raises InputError where too many were."""
        self.in_a_row = 0 if math.isfinite(loss) else self.in_a_row + 1
        if self.in_a_row == self.patience:
            raise InputError(f"the loss was not finite in {self.in_a_row} steps in a row (epoch {epoch}); lower --lr")
        return self.in_a_row > 0


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """The context in which a network computes: bfloat16 on a CUDA device, batch norms of the whole batch."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), batch_norms():
        yield


def averaged(network: CamNetwork) -> tuple[CamNetwork, Callable[[float | Tensor], None]]:
    """The exponential moving average (EMA) of a network's weights: the network that holds it, and what moves it.

    That is called after every step with the decay d, a number or a scalar on the network's device:
    ema <- d ema + (1 - d) weights.
    """
    ema = copy.deepcopy(network).eval()
    of_ema, of_network = (list(itertools.chain(each.parameters(), each.buffers())) for each in (ema, network))
    pairs = list(zip(of_ema, of_network, strict=True))
    means, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]  # of the batches that batch norm has seen

    @torch.no_grad()
    def move(decay: float | Tensor) -> None:
        if isinstance(decay, Tensor):
            steps = torch._foreach_sub(weights, means)
            torch._foreach_mul_(steps, 1 - decay)
            torch._foreach_add_(means, steps)
        else:
            get_ema_multi_avg_fn(decay)(means, weights, None)
        if counts:
            torch._foreach_copy_(*map(list, zip(*counts, strict=True)))

    return ema, move


def copy_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict that later steps leave as it is."""
    return {name: tensor.clone() for name, tensor in weights.items()}


def save_epoch(out: Path, log: list[dict[str, Any]], modules: dict[str, Any], **state: Any) -> None:
    """Close an epoch: write OUT/log.csv, then OUT/last.pt, with which the epoch is done.

    modules: networks and optimizers, whose state dicts are kept under these names. state: what else is kept.
    """
    with processes.writing() as writes:
        if writes:
            write_csv(out / "log.csv", pd.DataFrame(log).round(6))
            states = {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint(out / "last.pt", {**states, **state, "log": log})


def begin(args: argparse.Namespace, settings: dict[str, Any], modules: dict[str, Any], **state: Any) -> list[Any]:
    """The log and the rest of a training's state before its next epoch: as given, or from OUT/last.pt with --resume.

    settings: as `training_settings`. modules: networks and optimizers; with --resume they are given their state dicts.
    state: by name, as `save_epoch` keeps it.
    """
    log = []
    if args.resume:
        last = read_last(Path(args.out) / "last.pt", settings, (*modules, "log", *state))
        log, state = restore(last, modules), {name: last[name] for name in state}
    begin_together(log, modules)
    return [log, *state.values()]


def begin_together(log: list[dict[str, Any]], modules: dict[str, Any]) -> None:
    """Make sure that all processes go on from the same epoch with the same weights."""
    processes.begin(len(log), *(module for module in modules.values() if isinstance(module, torch.nn.Module)))


def restore(last: dict[str, Any], modules: dict[str, Any]) -> list[dict[str, Any]]:
    """Give modules the state dicts that `save_epoch` kept of them; return the log so far."""
    for name, module in modules.items():
        module.load_state_dict(last[name])
    return last["log"]


def kept_detector(
    network: CamNetwork,
    best: dict[str, Tensor],
    start: dict[str, Tensor] | None,
    cut: Cut,
    args: argparse.Namespace,
    manifest_sha256: str,
) -> tuple[Detector, dict[str, Tensor]]:
    """The detector that a training leaves, its threshold not chosen yet, and its weights as they are stored.

    best: weights of the best epoch. start: those that the training started from; the kept weights are interpolated to
    them by --start_share. args: start_share, init_weights, and the scan settings per_mm2, match_um, views.
    """
    if start:
        best = interpolate(best, start, args.start_share)
        print(f"weight interpolation: the kept weights are {args.start_share:.0%} those of {args.init_weights}")
    network.load_state_dict(best)
    detector = Detector(
        network=fold_batch_norms(network),
        patch_size=cut.patch_size,
        patch_um_per_px=cut.um_per_px,
        normalise_stain=cut.normalise_stain,
        per_mm2=args.per_mm2,
        merge_um=args.match_um,
        views=args.views,
        manifest_sha256=manifest_sha256,
    )
    return detector, best


def check_batch(batch_size: int, patch_size: int, stride: int) -> None:
    """Raise InputError where a process would have no patch, or batch norm one value per channel.

    One value: batches of one patch, maps of one cell.
    """
    if batch_size < processes.size():
        raise InputError(
            f"--batch_size {batch_size}: {processes.size()} processes share a batch; expected a patch for each at least"
        )
    if batch_size == 1 and patch_size <= stride:
        raise InputError(
            f"--batch_size 1: patches of {patch_size} px at stride {stride} give one value per channel, and batch norm "
            "needs two; expected 2 or more"
        )


def cosine(progress: float) -> float:
    """Falls from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def val_f1(network: CamNetwork, patches: Patches, labels: np.ndarray, batch_size: int) -> float:
    """F1 of a network at the best threshold for the validation patches, which the processes share."""
    scores = score_patches(fold_batch_norms(network), _own(patches), batch_size)
    return best_f1(labels, processes.gathered(scores, len(labels)).numpy())


def features_of(network: CamNetwork, patches: Patches, batch_size: int) -> np.ndarray:
    """Features (N, C) of patches by a network, which the processes share."""
    features, _ = embed_patches(fold_batch_norms(network), _own(patches), batch_size)
    return processes.gathered(torch.from_numpy(features), len(patches)).numpy()


def _own(patches: Patches) -> Patches:
    """This process's part of patches that are looked at once each."""
    own = processes.own(len(patches))
    return patches.part(own) if isinstance(patches, MappedPatches) else patches[own]


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    """F1 at the best threshold for these patches: labels (N,) 0 or 1, scores (N,).

    Raises:
        InputError: scores that are not finite, as those of a network whose last step went too far.
    """
    if not np.isfinite(scores).all():
        raise InputError("the network's probabilities on val are not finite: the training has diverged; lower --lr")
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / (precision + recall).clip(min=1e-12)).max())
