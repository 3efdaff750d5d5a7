"""Stage 4 of 9: train the dual network and let the memory units watch every training patch.

Reads patches.csv and the training patches of stage 3 (or 1). Writes OUT/memory.csv (one row per training patch, in the
manifest's order; shifted copies have that of their mitosis), model.pt (last epoch), log.csv, curves.png, run.json and,
to resume from, last.pt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Positive, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # patches to train on
OUT = "results/DMU"  # folder to write
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE: Count = 16  # px of the patch per cell of the feature maps
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start both branches from this timm state dict or model.pt on disk instead
EPOCHS: Count = 100  # passes over all training patches, each patch once
WARMUP_SHARE: Share = 0.05  # share of EPOCHS in which the learning rate rises to LR
COUNT_AFTER_SHARE: Share = 0.2  # share of EPOCHS before states, learned and forgotten are counted
SCORE_AFTER_SHARE: Share = 0.0  # share of EPOCHS before noise_score begins to average
BATCH_SIZE: Count = 512  # largest number of patches per step
LR: Positive = 1e-4  # learning rate of Adam
FUSED_SHARE: Share = 0.5  # share of the fused head in the loss; the two branches halve the rest
LOSS_Q: Share = (
    0.7  # exponent of the loss: the higher, the slower wrong labels are learnt; 0: cross entropy (the paper)
)
CLASS_WEIGHTS = True  # the loss weighted by inverse label frequency; False: every patch weighs the same
WEAK_STRENGTH: Amount = 1.0  # of the weak augmentation, relative to the ranges in dasc/model/views.py
STRONG_STRENGTH: Amount = 1.0  # of the strong augmentation
CONFIDENCE_START: Share = 0.0  # memory m_v before the first epoch; 0: 1 / number of training patches
CONFIDENCE_MOMENTUM: Share = 0.99  # share of m_v that an epoch keeps
BIAS_CORRECTION = True  # compare with m_v freed of its start, which else weighs e^-1 after 100 epochs; False: the paper
DISTANCE_MOMENTUM: Share = 0.99  # share of the centroid distance's memory that an epoch keeps
NAN_STEPS: Count = 10  # steps in a row without a finite loss before training stops
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
SEED = 0  # of the first weights, the order and the augmentation
WORKERS: Count = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import pandas as pd
import torch
from tqdm import tqdm

from dasc.data.cut import read_cut
from dasc.data.pack import open_patches
from dasc.data.splits import nucleus_of
from dasc.data.tables import LABELS, MEMORY, check_both_labels, read_patches, write_table
from dasc.model import loop, processes
from dasc.model.checkpoint import save_checkpoint
from dasc.model.losses import generalised_cross_entropy
from dasc.model.memory import STATES, UNSEEN, VIEWS, Memory, Settings, noise_score, start, thresholds, update
from dasc.model.network import CLASSES, DualNetwork
from dasc.model.start import load_initial_weights, training_settings
from dasc.model.step import Step
from dasc.model.transfer import upload
from dasc.model.views import strong_view, weak_view
from dasc.report.plots import curves
from dasc.run import pick_device, record_run, run_script


def main(args) -> int:
    device = pick_device(args.device, processes.size() > 1)
    manifest, out = Path(args.manifest), Path(args.out)
    table = read_patches(manifest)
    rows = table[table["split"] == "train"].reset_index(drop=True)
    check_both_labels(rows, f"{manifest}: split train", "see --val and --test of pre/cut_patch_2.py")
    cut = read_cut(manifest.parent)
    loop.check_batch(args.batch_size, cut.patch_size, args.stride)
    patches = open_patches(manifest.parent, rows["patch"].tolist(), args.workers, cut.patch_size)
    labels = torch.tensor(rows["label"].to_numpy())

    settings = training_settings(args, manifest=manifest, init_weights=args.init_weights)
    processes.start(device, settings)
    torch.manual_seed(args.seed)
    network = DualNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not args.resume)
    if args.init_weights:
        for branch in (network.weak, network.strong):
            load_initial_weights(branch, Path(args.init_weights))
    network.to(device, memory_format=torch.channels_last)
    units = Settings(
        confidence_start=args.confidence_start or 1 / len(rows),
        confidence_momentum=args.confidence_momentum,
        bias_correction=args.bias_correction,
        distance_momentum=args.distance_momentum,
    )
    memory, log = train(network, patches, labels, units, settings, args)
    if not processes.finish():
        return 0

    write_table(out / "memory.csv", memory_table(rows, memory, units), MEMORY)
    config = {"network": "dual", "backbone": args.backbone, "stride": args.stride, "classes": list(CLASSES)}
    config |= {"patch_size": cut.patch_size, "um_per_px": cut.um_per_px, "normalise_stain": cut.normalise_stain}
    config["manifest_sha256"] = settings["manifest_sha256"]
    save_checkpoint(out / "model.pt", {"model": network.state_dict(), "config": config})
    panels = {"loss": ["loss"], "share of the patches": list(STATES)}
    panels |= {f"share of label {word}": [f"{word}_{state}" for state in STATES] for word in LABELS.values()}
    curves(out / "curves.png", pd.DataFrame(log), panels)
    skipped = sum(row["skipped"] for row in log)  # patches of steps without a finite loss
    facts = {"patches": count_labels(labels), "memory": vars(units), "skipped_patches": skipped}
    record_run(out, args, inputs={manifest: len(table)}, device=device, **facts)
    print_states(memory, labels, args.epochs - loop.epochs_of(args.count_after_share, args.epochs))
    print(f"wrote {out / 'memory.csv'}")
    return 0


def train(network, patches, labels, units: Settings, settings: dict, args) -> tuple[Memory, list[dict]]:
    """The memory units after the last epoch, and the log. patches: (N, 3, S, S) uint8. labels: (N,)."""
    out, device = Path(args.out), next(network.parameters()).device
    weights = len(labels) / (2 * labels.bincount(minlength=2)) if args.class_weights else torch.ones(2)
    weights = weights.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    modules = {"model": network, "optimizer": optimizer}
    log, memory = loop.begin(args, settings, modules, memory=vars(start(len(labels), units)))
    memory = Memory(**memory)
    branch_share = 0.5 - args.fused_share / 2
    view_shares = torch.tensor([branch_share, branch_share, args.fused_share], device=device)
    warmup = args.warmup_share * args.epochs
    count_after, score_after = (
        loop.epochs_of(share, args.epochs) for share in (args.count_after_share, args.score_after_share)
    )
    steps = -(-len(labels) // args.batch_size)
    guard = loop.LossGuard(args.nan_steps, steps)
    learned = loop.Rows(device, labels, patches=patches)

    def losses(weak, strong, truth):
        with loop.autocast(device):
            logits, pooled = network(weak, strong)
        logits = processes.gathered(logits.float(), len(truth), axis=1)
        active = processes.gathered(pooled.detach() > 0, len(truth))
        of_views = generalised_cross_entropy(logits.flatten(0, 1), truth.repeat(len(VIEWS)), args.loss_q)
        loss = view_shares @ (of_views.view(len(VIEWS), -1) * weights[truth]).mean(dim=1)
        return [loss], [logits.detach().softmax(dim=2), active]

    step = Step(losses, optimizer)
    network.train()
    for epoch in range(len(log), args.epochs):
        generator = loop.epoch_generator(args.seed, epoch)
        # On the device until the epoch's end. NaN: the step was skipped.
        probabilities = torch.full((len(VIEWS), len(labels), len(CLASSES)), torch.nan, device=device)
        features = torch.zeros(len(labels), network.width, dtype=torch.bool, device=device)
        total = 0.0
        # Every patch exactly once, in batches of nearly one size: no last batch of a patch or two.
        order = torch.randperm(len(labels), generator=generator).tensor_split(steps)
        progress = tqdm(order, f"epoch {epoch}", leave=False)
        for number, batch in enumerate(progress):
            shown, truth = learned(batch)
            drawn = processes.draws(generator, len(batch))
            weak = weak_view(shown, drawn, args.weak_strength)
            strong = strong_view(shown, drawn, args.strong_strength)
            (loss,), (of_heads, active) = step(weak, strong, truth)
            if guard.passes_over(loss, epoch):
                continue
            step.update(args.lr * min(1.0, (epoch + (number + 1) / steps) / max(warmup, 1e-9)))
            there = upload(batch, device)
            probabilities[:, there] = of_heads
            features[there] = active
            total += loss * len(batch)
            progress.set_postfix(loss=f"{loss:.3f}", noisy=f"{log[-1]['noisy']:.3f}" if log else "-")

        memory, state = update(
            memory, labels, probabilities.cpu(), features.cpu(), units, epoch >= count_after, epoch >= score_after
        )
        row = {"epoch": epoch, "loss": total, **shares(state, labels)}
        log.append(row | {"loss": total / (len(labels) - row["skipped"])})
        loop.save_epoch(out, log, modules, memory=vars(memory), settings=settings)
    return memory, log


def count_labels(labels: torch.Tensor) -> dict[str, int]:
    """How many patches (N,) each label has."""
    return {word: int((labels == label).sum()) for label, word in LABELS.items()}


def shares(state: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Shares of the patches seen in an epoch that were clean, hard and noisy, of all and per label; patches skipped."""
    row: dict[str, float] = {"skipped": int((state == UNSEEN).sum())}
    groups = {"": labels >= 0, **{f"{word}_": labels == label for label, word in LABELS.items()}}
    for prefix, members in groups.items():
        seen = max(1, int((members & (state != UNSEEN)).sum()))
        row |= {f"{prefix}{name}": int((members & (state == code)).sum()) / seen for code, name in enumerate(STATES)}
    return row


def memory_table(train: pd.DataFrame, memory: Memory, units: Settings) -> pd.DataFrame:
    """memory.csv: a row per training patch, in the manifest's order; a shifted copy has the memory of its mitosis.

    Only mitoses have shifted copies, so that a nucleus out of the middle gives the label away: copies with a wrong
    label were called clean far oftener than the patch they were made of (docs/log.md).
    """
    columns = {name: getattr(memory, name) for name in (*STATES, "learned", "forgotten")}
    columns |= {f"confidence_{view}": row for view, row in zip(VIEWS, thresholds(memory, units), strict=True)}
    columns |= {"centroid_distance": memory.distance, "noise_score": noise_score(memory)}
    numbers = pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()}, index=train["patch"])
    of_nucleus = numbers.loc[nucleus_of(train)].reset_index(drop=True)
    return pd.concat([train[["patch", "label", "origin"]], of_nucleus], axis=1).round(6)


def print_states(memory: Memory, labels: torch.Tensor, counted: int) -> None:
    """Say of each label in which states its patches were in the counted epochs."""
    for label, word in LABELS.items():
        members = labels == label
        ever = ", ".join(f"{int((getattr(memory, state)[members] > 0).sum())} {state}" for state in STATES)
        print(f"{word}: {int(members.sum())} patches, in {counted} counted epochs ever: {ever}")


if __name__ == "__main__":
    run_script(main, args, join=processes.join)
