"""Stage 6 of 9: learn to tell the level of a hard patch from its picture; levels that cannot be learned mean nothing.

Reads the levels of stage 5 and the patches; trains one network per label, both labels in one run.
Writes OUT/checked.csv (how often the level of each hard patch was predicted right), log.csv, curves.png, run.json
and, to resume from, last.pt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Positive, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # the patches of stage 3
HARD = "results/DMU/hard.csv"  # verdicts and levels of stage 5
OUT = "results/DMU_hard"  # folder to write
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE: Count = 16  # px of the patch per cell of the feature map
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
EPOCHS: Count = 70  # of each label, over as many draws as it has hard patches
SEEN_AFTER_SHARE: Share = 0.14  # share of EPOCHS before predictions count
BATCH_SIZE: Count = 32  # patches per step
LR: Positive = 1e-4  # learning rate of Adam
STAIN: Amount = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT: Amount = 0.2  # augmentation: relative change of brightness and contrast
FOCUS: Share = 0.8  # augmentation: largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS: Count = 10  # steps in a row without a finite loss before training stops
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
SEED = 0  # of the first weights, the draws and the augmentation
WORKERS: Count = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dasc.data.cut import read_cut
from dasc.data.pack import open_patches
from dasc.data.tables import CHECKED, LABELS, join_by_patch, levels_of, read_hard, read_patches, write_table
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model import loop, processes
from dasc.model.augment import training_view
from dasc.model.start import read_last, training_settings
from dasc.model.step import Step
from dasc.model.transfer import upload
from dasc.report.plots import curves
from dasc.run import pick_device, record_run, run_script


def main(args) -> int:
    device = pick_device(args.device, processes.size() > 1)
    manifest, hard_path, out = Path(args.manifest), Path(args.hard), Path(args.out)
    table = read_patches(manifest)
    rows = table.loc[table["split"] == "train", ["patch", "label"]]
    hard = join_by_patch(rows, read_hard(hard_path), manifest, hard_path)
    levels = levels_of(hard, hard["verdict"] == "hard")
    hard = hard[hard["verdict"] == "hard"].astype({"level": int}).reset_index(drop=True)
    learnable = learnable_labels(hard, hard_path)
    patch_size = read_cut(manifest.parent).patch_size
    loop.check_batch(args.batch_size, patch_size, args.stride)
    patches = {}  # of both labels, before hours of training on one
    for label in learnable:
        names = hard.loc[hard["label"] == label, "patch"].tolist()
        patches[label] = open_patches(manifest.parent, names, args.workers, patch_size)

    settings = training_settings(args, manifest=manifest, hard=hard_path, init_weights=args.init_weights)
    processes.start(device, settings)
    state = {"log": [], "seen": torch.zeros(len(hard), dtype=torch.long), "settings": settings}
    state["correct"] = state["seen"].clone()
    if args.resume and learnable:
        state = read_last(out / "last.pt", settings, (*state, "model", "optimizer"))
    for label in learnable:
        members = torch.from_numpy(np.flatnonzero(hard["label"] == label))
        of_label = torch.tensor(hard.loc[members.numpy(), "level"].to_numpy())
        train(LABELS[label], patches[label], of_label, levels, members, state, device, args)
    if not processes.finish():
        return 0

    checked = hard.assign(seen=state["seen"].numpy(), correct=state["correct"].numpy())
    write_table(out / "checked.csv", checked, CHECKED)
    log = pd.DataFrame(state["log"], columns=["label", "epoch", "loss", "correct", "skipped"])
    write_csv(out / "log.csv", log.round(6))
    if len(log):
        draw_log(out / "curves.png", log)
    inputs = {manifest: len(table), hard_path: len(rows)}
    facts = {"hard_patches": len(hard), "skipped_patches": int(log["skipped"].sum())}
    record_run(out, args, inputs=inputs, device=device, **facts)
    for (label, level), group in checked.groupby(["label", "level"]):
        print(f"{LABELS[label]}, level {level}: {len(group)} hard patches, {share_right(group)}")
    print(f"wrote {out / 'checked.csv'}")
    return 0


def learnable_labels(hard: pd.DataFrame, path: Path) -> list[int]:
    """The labels whose hard patches have more than one level; says of the others why not."""
    learnable = [label for label in LABELS if len(hard.loc[hard["label"] == label, "level"].unique()) > 1]
    for label, word in LABELS.items():
        count = (hard["label"] == label).sum()
        if not count:
            print(f"{word}: no hard patch in {path}; HARD_SHARE and NOISY_SHARE of clus_hard.py decide")
        elif label not in learnable:
            print(f"{word}: {count} hard patches of one level, nothing to tell apart: none is put to the test")
    return learnable


def share_right(group: pd.DataFrame) -> str:
    """How often the level of these patches was predicted right."""
    seen = group["seen"].sum()
    return f"level right in {group['correct'].sum() / seen:.0%} of the predictions" if seen else "not put to the test"


def train(
    word: str,
    patches: torch.Tensor,
    of_label: torch.Tensor,
    levels: int,
    members: torch.Tensor,
    state: dict,
    device: torch.device,
    args,
) -> None:
    """Train on the hard patches of one label; count in `state` how often each level was predicted right.

    patches: (N, 3, S, S) uint8. of_label: (N,), their levels. levels: how many there are. members: (N,), the places of
    the patches in the state's `seen` and `correct`.
    """
    done = sum(row["label"] == word for row in state["log"])
    if done == args.epochs:
        return
    network, _ = loop.start_network(args, device, resumed=done > 0)
    network.cam_head = nn.Conv2d(network.cam_head.in_channels, levels, kernel_size=1).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    modules = {"model": network, "optimizer": optimizer}
    if done:
        loop.restore(state, modules)
    loop.begin_together(state["log"], modules)
    frequency = torch.bincount(of_label, minlength=levels).float()
    strengths = (args.stain, args.light, args.focus)
    seen_after = loop.epochs_of(args.seen_after_share, args.epochs)
    guard = loop.LossGuard(args.nan_steps, -(-len(of_label) // args.batch_size))
    learned = loop.Rows(device, of_label, patches=patches)

    def losses(views, truth):
        with loop.autocast(device):
            logits = processes.gathered(network(views), len(truth))
            return [F.cross_entropy(logits.float(), truth)], []

    step = Step(losses, optimizer)
    for epoch in range(done, args.epochs):
        generator = loop.epoch_generator(args.seed, epoch)
        network.train()
        total, skipped = 0.0, 0
        draws = torch.multinomial(1 / frequency[of_label], len(of_label), replacement=True, generator=generator)
        for batch in tqdm(loop.batches(draws, args.batch_size), f"{word}, epoch {epoch}", leave=False):
            shown, truth = learned(batch)
            views = training_view(shown, processes.draws(generator, len(batch)), *strengths)
            (loss,), _ = step(views, truth)
            if guard.passes_over(loss, epoch):
                skipped += len(batch)
                continue
            step.update(args.lr)
            total += loss * len(batch)

        row = {"label": word, "epoch": epoch, "loss": total / (len(of_label) - skipped), "correct": float("nan")}
        row["skipped"] = skipped
        if epoch >= seen_after:  # every patch once, so that every share rests on as many views
            right = predict(network, *learned.patches, generator, strengths, 2 * args.batch_size) == of_label
            state["seen"][members] += 1
            state["correct"][members] += right
            row["correct"] = right.float().mean().item()
        state["log"].append(row)
        kept = {name: state[name] for name in ("seen", "correct", "settings")}
        loop.save_epoch(Path(args.out), state["log"], modules, **kept)


@torch.inference_mode()
def predict(network, patches, generator, strengths, batch_size) -> torch.Tensor:
    """Level (N,) of one augmented view of every patch (N, 3, S, S), in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for batch in patches.split(batch_size):
        own = upload(batch[processes.own(len(batch))], device)
        views = training_view(own, processes.draws(generator, len(batch)), *strengths)
        with loop.autocast(device):
            parts.append(processes.gathered(network(views).float(), len(batch)))
    logits = torch.cat(parts).cpu()
    if not torch.isfinite(logits).all():
        raise InputError("the network's outputs are not finite: the training has diverged; lower --lr")
    return logits.argmax(dim=1)


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
    run_script(main, args, join=processes.join)
