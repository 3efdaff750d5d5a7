"""Stage 6 of 9: learn to tell the level of a hard patch from its picture; levels that cannot be learned mean nothing.

Reads the levels of stage 5 and the patches; trains one network per label, both labels in one run.
Writes OUT/checked.csv (how often the level of each hard patch was predicted right), log.csv, curves.png, run.json
and, to resume from, last.pt.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dasc.data.patches import load_patches
from dasc.data.tables import LABELS, read_patches
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model.augment import training_view
from dasc.model.checkpoint import load_initial_weights, read_last, save_checkpoint, training_settings
from dasc.model.difficulty import CHECKED_COLUMNS, join_by_patch, read_hard, validated
from dasc.model.loop import batches, check_batch
from dasc.model.network import CamNetwork
from dasc.report.plots import curves
from dasc.run import pick_device, positive, record_run, run_script, true_or_false

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # the patches of stage 3
HARD = "results/DMU/hard.csv"  # verdicts and levels of stage 5
OUT = "results/DMU_hard"  # folder to write
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE = 16  # px of the patch per cell of the feature map
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
EPOCHS = 70  # of each label, over as many draws as it has hard patches
SEEN_AFTER = 10  # epochs before predictions count
KEEP_SHARE = 0.5  # `kept` is 1 from this share of right predictions on; clus_scl.py decides with its own
LEVELS = 3  # levels of difficulty, as in clus_hard.py
BATCH_SIZE = 32  # patches per step
LR = 1e-4  # learning rate of Adam
STAIN = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT = 0.2  # relative change of brightness and contrast
FOCUS = 0.8  # largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS = 10  # steps in a row without a finite loss before training stops
DEVICE = "auto"  # auto, cpu, cuda or mps
SEED = 0
WORKERS = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=MANIFEST, help="patches.csv of stage 3")
    parser.add_argument("--hard", default=HARD, help="hard.csv of stage 5")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--backbone", default=BACKBONE, help="timm model")
    parser.add_argument("--stride", type=int, default=STRIDE, help="px per cell of the feature map")
    parser.add_argument("--pretrained", type=true_or_false, default=PRETRAINED, help="timm's ImageNet weights")
    parser.add_argument("--init_weights", default=INIT_WEIGHTS, help="timm state dict or model.pt to start from")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help="epochs of each label")
    parser.add_argument("--seen_after", type=int, default=SEEN_AFTER, help="epochs before predictions count")
    parser.add_argument("--keep_share", type=float, default=KEEP_SHARE, help="share of right levels for kept = 1")
    parser.add_argument("--levels", type=positive, default=LEVELS, help="levels of difficulty, as in clus_hard.py")
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="patches per step")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate")
    parser.add_argument("--stain", type=float, default=STAIN, help="strength of stain augmentation")
    parser.add_argument("--light", type=float, default=LIGHT, help="strength of brightness and contrast changes")
    parser.add_argument("--focus", type=float, default=FOCUS, help="strength of blurring and sharpening")
    parser.add_argument("--nan_steps", type=int, default=NAN_STEPS, help="steps without a finite loss before it stops")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read patches")
    parser.add_argument("--resume", type=true_or_false, nargs="?", const=True, default=RESUME)
    return parser


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    manifest, hard_path, out = Path(args.manifest), Path(args.hard), Path(args.out)
    if args.epochs <= args.seen_after:
        raise InputError(f"--epochs {args.epochs}: nothing would count; give more than --seen_after {args.seen_after}")
    patches = read_patches(manifest)
    train = patches.loc[patches["split"] == "train", ["patch", "label"]]
    table = join_by_patch(train, read_hard(hard_path, args.levels), manifest, hard_path)
    table = table[table["verdict"] == "hard"].astype({"level": int}).reset_index(drop=True)
    learnable = [label for label in LABELS if len(table.loc[table["label"] == label, "level"].unique()) > 1]
    for label, word in LABELS.items():
        count = (table["label"] == label).sum()
        if not count:
            print(f"{word}: no hard patch in {hard_path}; HARD_SHARE and NOISY_SHARE of clus_hard.py decide")
        elif label not in learnable:
            print(f"{word}: {count} hard patches of one level, nothing to tell apart: all are kept")

    settings = training_settings(args, manifest=args.manifest, hard=args.hard, init_weights=args.init_weights)
    del settings["keep_share"]
    state = {"log": [], "seen": torch.zeros(len(table), dtype=torch.long), "settings": settings}
    state["correct"] = state["seen"].clone()
    if args.resume and learnable:
        keys = ("log", "seen", "correct", "model", "optimizer")
        state = read_last(out / "last.pt", settings, keys)
    pictures = {}  # of both labels, before hours of training on one
    for label in learnable:
        files = [manifest.parent / patch for patch in table.loc[table["label"] == label, "patch"]]
        pictures[label] = load_patches(files, args.workers)
        check_batch(args.batch_size, pictures[label].shape[-1], args.stride)
    for label in learnable:
        rows = torch.from_numpy(np.flatnonzero(table["label"] == label))
        levels = torch.tensor(table.loc[rows.numpy(), "level"].to_numpy())
        learn_levels(LABELS[label], pictures[label], levels, rows, state, device, args)

    seen, correct = state["seen"].numpy(), state["correct"].numpy()
    kept = validated(seen, correct, args.keep_share)
    table = table.assign(seen=seen, correct=correct, kept=kept.astype(int))
    write_csv(out / "checked.csv", table[list(CHECKED_COLUMNS)])
    log = pd.DataFrame(state["log"], columns=["label", "epoch", "loss", "correct", "skipped"])
    write_csv(out / "log.csv", log.round(6))
    if len(log):
        draw_log(out / "curves.png", log)
    inputs = {manifest: len(patches), hard_path: len(train)}
    facts = {"hard_patches": len(table), "kept": int(kept.sum()), "skipped_patches": int(log["skipped"].sum())}
    record_run(out, args, inputs=inputs, device=device, **facts)
    for (label, level), group in table.groupby(["label", "level"]):
        print(f"{LABELS[label]}, level {level}: {group['kept'].sum()} of {len(group)} hard patches kept")
    print(f"{kept.sum()} of {len(table)} hard patches kept; wrote {out / 'checked.csv'}")
    return 0


def learn_levels(
    word: str,
    pictures: torch.Tensor,
    levels: torch.Tensor,
    rows: torch.Tensor,
    state: dict,
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Train on the hard patches of one label; count in `state` how often each level was predicted right.

    Args:
        pictures: (N, 3, S, S) uint8. levels: (N,). rows: (N,), their places in the state's `seen` and `correct`.
    """
    done = sum(row["label"] == word for row in state["log"])
    if done == args.epochs:
        return
    torch.manual_seed(args.seed)
    network = CamNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not done)
    network.cam_head = nn.Conv2d(network.cam_head.in_channels, args.levels, kernel_size=1)
    if args.init_weights:
        load_initial_weights(network, Path(args.init_weights))
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    if done:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    frequency = torch.bincount(levels, minlength=args.levels).float()
    autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": device.type == "cuda"}
    strengths = (args.stain, args.light, args.focus)

    steps = -(-len(levels) // args.batch_size)
    patience = max(1, min(args.nan_steps, steps))  # a short epoch is not gone through in vain
    nan_steps = 0
    for epoch in range(done, args.epochs):
        seed = args.seed * 100_003 + epoch
        generator = torch.Generator().manual_seed(seed)  # an epoch draws the same when resumed
        torch.manual_seed(seed)
        network.train()
        total, skipped = 0.0, 0
        draws = torch.multinomial(1 / frequency[levels], len(levels), replacement=True, generator=generator)
        for batch in tqdm(batches(draws, args.batch_size), f"{word}, epoch {epoch}", leave=False):
            views = training_view(pictures[batch].to(device), generator, *strengths)
            with torch.autocast(**autocast):
                loss = F.cross_entropy(network(views).float(), levels[batch].to(device))
            nan_steps = 0 if torch.isfinite(loss) else nan_steps + 1
            if nan_steps == patience:
                raise InputError(f"the loss was not finite in {nan_steps} steps in a row (epoch {epoch}); lower --lr")
            if nan_steps:
                skipped += len(batch)
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)

        row = {"label": word, "epoch": epoch, "loss": total / (len(levels) - skipped), "correct": float("nan")}
        row["skipped"] = skipped
        if epoch >= args.seen_after:  # every patch once, so that every share rests on as many views
            right = predict(network, pictures, generator, strengths, autocast, 2 * args.batch_size) == levels
            state["seen"][rows] += 1
            state["correct"][rows] += right
            row["correct"] = right.float().mean().item()
        state["log"].append(row)
        state |= {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(Path(args.out) / "last.pt", state)
        write_csv(Path(args.out) / "log.csv", pd.DataFrame(state["log"]).round(6))


@torch.inference_mode()
def predict(network, pictures, generator, strengths, autocast, batch_size) -> torch.Tensor:
    """Level (N,) of one augmented view of every patch (N, 3, S, S), in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    predicted = []
    for batch in pictures.split(batch_size):
        views = training_view(batch.to(device), generator, *strengths)
        with torch.autocast(**autocast):
            logits = network(views).float()
        if not torch.isfinite(logits).all():
            raise InputError("the network's outputs are not finite: the training has diverged; lower --lr")
        predicted.append(logits.argmax(dim=1).cpu())
    return torch.cat(predicted)


def draw_log(path: Path, log: pd.DataFrame) -> None:
    """Loss and share of right levels of both labels."""
    columns = {}
    for word, part in log.groupby("label"):
        part = part.set_index("epoch")
        columns |= {f"{word}, {name}": part[name] for name in ("loss", "correct")}
    panels = {
        title: [column for column in columns if column.endswith(f", {name}")]
        for name, title in (("loss", "cross entropy"), ("correct", "levels predicted right"))
    }
    curves(path, pd.DataFrame(columns).reset_index(), panels)


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
