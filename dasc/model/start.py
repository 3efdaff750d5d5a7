"""What a training starts from: weights on disk, or its own last.pt when it is resumed."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dasc.errors import InputError
from dasc.files import sha256
from dasc.model.checkpoint import SCAN_SETTINGS, read_tensors
from dasc.model.first_look import FirstLook
from dasc.model.network import CamNetwork

# Flags that no epoch of training depends on. Where files lie is one of these: their hashes are compared.
PLACES = ("manifest", "hard", "scl", "out", "data_root", "init_weights", "model_path")
AFTERWARDS = ("start_share", "match_um", *SCAN_SETTINGS, "per_group")
MACHINE = ("device", "workers", "resume")


def load_initial_weights(network: CamNetwork | FirstLook, path: Path) -> dict[str, Tensor] | None:
    """Start the backbone from weights on disk: a model of stage 2 or 8, or a timm state dict, whole or cut.

    Of a model the head stays out: only what the backbone has learned carries over to another training.

    Returns: the weights of a model that fits the whole network, head included, for `interpolate`; None of any other
    file.
    Raises: InputError: unreadable file, or weights of another backbone: every tensor of the backbone must be in it.
    """
    content = read_tensors(path)
    content = content.get("model", content) if isinstance(content, dict) else {}
    whole = content if isinstance(content, dict) else {}
    weights = {str(name).removeprefix("backbone."): tensor for name, tensor in whole.items()}
    wanted = network.backbone.state_dict()
    absent = _absent(weights, wanted)
    if absent:
        raise InputError(
            f"{path}: does not fit the backbone: {len(absent)} of {len(wanted)} tensors are missing or of another "
            f"shape (first: {absent[0]}); expected a timm state dict, or a model.pt, of the same --backbone"
        )
    network.backbone.load_state_dict({name: weights[name] for name in wanted})
    wanted = network.state_dict()
    return None if _absent(whole, wanted) else {name: whole[name].to(tensor) for name, tensor in wanted.items()}


def _absent(weights: dict[str, Any], wanted: dict[str, Tensor]) -> list[str]:
    """Names of the wanted tensors that the weights lack, or have in another shape."""
    return [
        name
        for name, tensor in wanted.items()
        if not isinstance(weights.get(name), Tensor) or weights[name].shape != tensor.shape
    ]


def interpolate(trained: dict[str, Tensor], start: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weight interpolation (WiSE-FT): the weights this share of the way from the trained ones back to the start.

    It keeps both what fine-tuning gains on its own slides and what the start knew of others (Wortsman et al. 2022,
    "Robust fine-tuning of zero-shot models").
    """
    return {
        name: tensor.lerp(start[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


def training_settings(args: argparse.Namespace, **files: str | Path | None) -> dict[str, Any]:
    """Everything that the epochs of a training depend on: flags, and `<name>_sha256` of every file that is given.

    files: the files it reads, by the name of their flag; None or an empty text: not given.
    """
    left_out = {*PLACES, *AFTERWARDS, *MACHINE}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return settings | {f"{name}_sha256": sha256(Path(path)) for name, path in files.items() if path}


def read_last(path: Path, settings: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Read the last.pt of an interrupted training that had the same settings.

    settings: as `training_settings`. keys: what the last.pt must hold beside its own settings.
    Raises: InputError: no such file, one that is none of these, other files or settings.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; nothing to resume from, leave out --resume")
    last = read_tensors(path)
    if not isinstance(last, dict) or not {*keys, "settings"} <= last.keys() or not isinstance(last["settings"], dict):
        raise InputError(f"{path}: expected the last.pt of an interrupted training of this stage; leave out --resume")
    begun = last["settings"]
    hashes = [name for name in {**settings, **begun} if str(name).endswith("_sha256")]
    for name in hashes:
        if begun.get(name) != settings.get(name):
            flag = str(name).removesuffix("_sha256")
            other = "other weights" if flag == "init_weights" else "another table"
            raise InputError(f"{path}: was begun with {other} than --{flag} names; leave out --resume")
    for name, value in settings.items():
        if begun.get(name) != value:
            raise InputError(f"{path}: was begun with --{name} {begun.get(name)}, not {value}")
    return last
