"""Stage 4 of 9: train the dual network and let the memory units watch every training patch.

Reads patches.csv and the training patches of stage 3 (or 1). Writes OUT/memory.csv (one row per training patch, in the
manifest's order; shifted copies have that of their mitosis), model.pt (last epoch), log.csv, curves.png, run.json and,
to resume from, last.pt.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from tqdm import tqdm

from dasc.data.patches import load_patches
from dasc.data.splits import nucleus_of
from dasc.data.tables import LABELS, read_cut_run, read_patches
from dasc.errors import InputError
from dasc.files import sha256, write_csv
from dasc.model.checkpoint import load_initial_weights, read_last, save_checkpoint, training_settings
from dasc.model.loop import check_batch
from dasc.model.losses import generalised_cross_entropy
from dasc.model.memory import STATES, UNSEEN, VIEWS, Memory, Settings, noise_score, start, thresholds, update
from dasc.model.network import CLASSES, DualNetwork
from dasc.model.views import strong_view, weak_view
from dasc.report.plots import curves
from dasc.run import pick_device, positive, record_run, run_script, true_or_false

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # patches to train on
OUT = "results/DMU"  # folder to write
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE = 16  # px of the patch per cell of the feature maps
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start both branches from this timm state dict or model.pt on disk instead
EPOCHS = 100  # passes over all training patches, each patch once
WARMUP = 5  # epochs in which the learning rate rises to LR
COUNT_AFTER = 20  # epochs before states, learned and forgotten are counted
SCORE_AFTER = 0  # epochs before noise_score begins to average
BATCH_SIZE = 512  # largest number of patches per step
LR = 1e-4  # learning rate of Adam
FUSED_SHARE = 0.5  # share of the fused head in the loss; the two branches halve the rest
LOSS_Q = 0.7  # exponent of the loss: the higher, the slower wrong labels are learnt; 0: cross entropy (the paper)
CLASS_WEIGHTS = True  # the loss weighted by inverse label frequency; False: every patch weighs the same
WEAK_STRENGTH = 1.0  # of the weak views' changes, relative to the ranges in dasc/model/views.py
STRONG_STRENGTH = 1.0  # of the strong views' changes
CONFIDENCE_START = 0.0  # memory m_v before the first epoch; 0: 1 / number of training patches
CONFIDENCE_MOMENTUM = 0.99  # share of m_v that an epoch keeps
BIAS_CORRECTION = True  # compare with m_v freed of its start, which else weighs e^-1 after 100 epochs; False: the paper
DISTANCE_MOMENTUM = 0.99  # share of the centroid distance's memory that an epoch keeps
NAN_STEPS = 10  # steps in a row without a finite loss before training stops
DEVICE = "auto"  # auto, cpu, cuda or mps
SEED = 0
WORKERS = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=MANIFEST, help="patches.csv to train on")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--backbone", default=BACKBONE, help="timm model")
    parser.add_argument("--stride", type=int, default=STRIDE, help="px per cell of the feature maps")
    parser.add_argument("--pretrained", type=true_or_false, default=PRETRAINED, help="timm's ImageNet weights")
    parser.add_argument("--init_weights", default=INIT_WEIGHTS, help="timm state dict or model.pt to start from")
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="epochs in which the learning rate rises")
    parser.add_argument("--count_after", type=int, default=COUNT_AFTER, help="epochs before states are counted")
    parser.add_argument("--score_after", type=int, default=SCORE_AFTER, help="epochs before noise_score averages")
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="largest number of patches per step")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate")
    parser.add_argument("--fused_share", type=float, default=FUSED_SHARE, help="share of the fused head in the loss")
    parser.add_argument("--loss_q", type=float, default=LOSS_Q, help="exponent of the loss; 0: cross entropy")
    parser.add_argument("--class_weights", type=true_or_false, default=CLASS_WEIGHTS, help="weigh labels equally")
    parser.add_argument("--weak_strength", type=float, default=WEAK_STRENGTH, help="of the weak views")
    parser.add_argument("--strong_strength", type=float, default=STRONG_STRENGTH, help="of the strong views")
    parser.add_argument("--confidence_start", type=float, default=CONFIDENCE_START, help="m_v at first; 0: 1 / patches")
    parser.add_argument("--confidence_momentum", type=float, default=CONFIDENCE_MOMENTUM, help="momentum of m_v")
    parser.add_argument("--bias_correction", type=true_or_false, default=BIAS_CORRECTION, help="free m_v of its start")
    parser.add_argument("--distance_momentum", type=float, default=DISTANCE_MOMENTUM, help="momentum of the distance")
    parser.add_argument("--nan_steps", type=int, default=NAN_STEPS, help="steps without a finite loss before it stops")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read patches")
    parser.add_argument("--resume", type=true_or_false, nargs="?", const=True, default=RESUME)
    return parser


def main(args: argparse.Namespace) -> int:
    check_epochs(args)
    if not 0 <= args.loss_q <= 1:
        raise InputError(f"--loss_q {args.loss_q}: expected 0 to 1")
    device = pick_device(args.device)
    manifest, out = Path(args.manifest), Path(args.out)
    table = read_patches(manifest)
    train = table[table["split"] == "train"].reset_index(drop=True)
    counts = {word: int((train["label"] == label).sum()) for label, word in LABELS.items()}
    if not all(counts.values()):
        found = ", ".join(f"{count} {word}" for word, count in counts.items())
        raise InputError(
            f"{manifest}: split train has {found} patches, both are needed; see cut_patch_2's --val, --test"
        )
    cut = read_cut_run(manifest.parent)["arguments"]
    patches = load_patches([manifest.parent / patch for patch in train["patch"]], args.workers)
    check_batch(args.batch_size, patches.shape[-1], args.stride)
    labels = torch.tensor(train["label"].to_numpy())
    weights = len(labels) / (2 * labels.bincount(minlength=2)) if args.class_weights else torch.ones(2)

    torch.manual_seed(args.seed)
    network = DualNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not args.resume)
    if args.init_weights:
        for branch in (network.weak, network.strong):
            load_initial_weights(branch, Path(args.init_weights))
    network.to(device, memory_format=torch.channels_last)
    weights = weights.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    config = {
        "network": "dual",
        "backbone": args.backbone,
        "stride": args.stride,
        "patch_size": patches.shape[-1],
        "um_per_px": cut["patch_um_per_px"],
        "normalise_stain": cut["normalise_stain"],
        "classes": list(CLASSES),
        "threshold": 0.5,
        "manifest_sha256": sha256(manifest),
    }
    settings = training_settings(args, manifest=args.manifest, init_weights=args.init_weights)
    units = Settings(
        confidence_start=args.confidence_start or 1 / len(train),
        confidence_momentum=args.confidence_momentum,
        bias_correction=args.bias_correction,
        distance_momentum=args.distance_momentum,
    )
    memory, log = start(len(train), units), []
    if args.resume:
        checkpoint = read_last(out / "last.pt", settings, ("model", "optimizer", "memory", "log"))
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        memory, log = Memory(**checkpoint["memory"]), checkpoint["log"]

    steps = -(-len(train) // args.batch_size)
    view_shares = torch.tensor(
        [0.5 - args.fused_share / 2, 0.5 - args.fused_share / 2, args.fused_share], device=device
    )
    patience = max(1, min(args.nan_steps, steps))  # a short epoch is not gone through in vain
    nan_steps = 0
    network.train()
    for epoch in range(len(log), args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)  # an epoch draws the same when resumed
        torch.manual_seed(args.seed * 100_003 + epoch)
        probabilities = torch.full((len(VIEWS), len(train), len(CLASSES)), torch.nan)  # NaN: the step was skipped
        features = torch.zeros(len(train), network.width, dtype=torch.bool)
        total = 0.0
        # Every patch exactly once, in batches of nearly one size: no last batch of a patch or two.
        order = torch.randperm(len(train), generator=generator).tensor_split(steps)
        batches = tqdm(order, f"epoch {epoch}", leave=False)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (epoch + (step + 1) / steps) / max(args.warmup, 1e-9))
            there, batch_labels = patches[batch].to(device), labels[batch].to(device)
            weak = weak_view(there, generator, args.weak_strength)
            strong = strong_view(there, generator, args.strong_strength)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, pooled = network(weak, strong)
            logits = logits.float()
            losses = generalised_cross_entropy(logits.flatten(0, 1), batch_labels.repeat(len(VIEWS)), args.loss_q)
            loss = view_shares @ (losses.view(len(VIEWS), -1) * weights[batch_labels]).mean(dim=1)
            nan_steps = 0 if torch.isfinite(loss) else nan_steps + 1
            if nan_steps == patience:
                raise InputError(f"the loss was not finite in {nan_steps} steps in a row (epoch {epoch}); lower --lr")
            if nan_steps:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            probabilities[:, batch] = logits.detach().softmax(dim=2).cpu()
            features[batch] = (pooled.detach() > 0).cpu()
            total += loss.item() * len(batch)
            batches.set_postfix(loss=f"{loss.item():.3f}", noisy=f"{log[-1]['noisy']:.3f}" if log else "-")

        memory, state = update(
            memory, labels, probabilities, features, units, epoch >= args.count_after, epoch >= args.score_after
        )
        row = {"epoch": epoch, "loss": total, **shares(state, labels)}
        log.append(row | {"loss": total / (len(train) - row["skipped"])})
        content = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "memory": vars(memory),
            "log": log,
        }
        write_csv(out / "log.csv", pd.DataFrame(log).round(6))  # before last.pt: with that, the epoch is done
        save_checkpoint(out / "last.pt", {**content, "config": config, "settings": settings})

    write_csv(out / "memory.csv", memory_table(train, memory, units))
    save_checkpoint(out / "model.pt", {"model": network.state_dict(), "config": config})
    panels = {"loss": ["loss"], "share of the patches": list(STATES)}
    panels |= {f"share of label {word}": [f"{word}_{state}" for state in STATES] for word in LABELS.values()}
    curves(out / "curves.png", pd.DataFrame(log), panels)
    skipped = sum(row["skipped"] for row in log)  # patches of steps without a finite loss
    facts = {"patches": counts, "memory": vars(units), "skipped_patches": skipped}
    record_run(out, args, inputs={manifest: len(table)}, device=device, **facts)
    for label, word in LABELS.items():
        mine = labels == label
        ever = ", ".join(f"{int((getattr(memory, state)[mine] > 0).sum())} {state}" for state in STATES)
        print(f"{word}: {counts[word]} patches, in {args.epochs - args.count_after} counted epochs ever: {ever}")
    print(f"wrote {out / 'memory.csv'}")
    return 0


def check_epochs(args: argparse.Namespace) -> None:
    """Refuse a run in which the memory would have nothing to count."""
    for flag, after in (("count_after", max(args.count_after, 1)), ("score_after", args.score_after)):
        if args.epochs <= after:
            raise InputError(
                f"--epochs {args.epochs} with --{flag} {getattr(args, flag)}: the memory needs more than {after} "
                f"epoch{'s' * (after != 1)}; raise EPOCHS or lower {flag.upper()}"
            )


def shares(state: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Shares of the patches seen in an epoch that were clean, hard and noisy, of all and per label; patches skipped."""
    row: dict[str, float] = {"skipped": int((state == UNSEEN).sum())}
    groups = {"": labels >= 0, **{f"{word}_": labels == label for label, word in LABELS.items()}}
    for prefix, mine in groups.items():
        seen = max(1, int((mine & (state != UNSEEN)).sum()))
        row |= {f"{prefix}{name}": int((mine & (state == code)).sum()) / seen for code, name in enumerate(STATES)}
    return row


def memory_table(train: pd.DataFrame, memory: Memory, units: Settings) -> pd.DataFrame:
    """memory.csv: a row per training patch, in the manifest's order; a shifted copy has the memory of its mitosis.

    Only mitoses have shifted copies, so that a nucleus out of the middle gives the label away: copies with a wrong
    label were called clean far oftener than the patch they were made of (docs/measured.md).
    """
    columns = {name: getattr(memory, name) for name in (*STATES, "learned", "forgotten")}
    columns |= {f"confidence_{view}": row for view, row in zip(VIEWS, thresholds(memory, units), strict=True)}
    columns |= {"centroid_distance": memory.distance, "noise_score": noise_score(memory)}
    numbers = pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()}, index=train["patch"])
    of_nucleus = numbers.loc[nucleus_of(train)].reset_index(drop=True)
    return pd.concat([train[["patch", "label", "origin"]], of_nucleus], axis=1).round(6)


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
