"""Networks on disk: save and load, initial weights, weight interpolation, what a resumed training must agree on."""

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dasc.errors import InputError
from dasc.files import replacing
from dasc.model.network import CLASSES, SearchNetwork, fold_batch_norms


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain types, so that the file loads with `weights_only=True`; same content, same bytes."""
    buffer = io.BytesIO()  # given a path, torch writes its name into the file, and on a full disk hides why it failed
    torch.save(checkpoint, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_network(path: Path, device: torch.device) -> tuple[SearchNetwork, dict[str, Any]]:
    """Load a checkpoint for prediction: the network with folded batch norms on `device`, and its config.

    Config: backbone, stride, patch_size (px), um_per_px, normalise_stain, threshold, classes, manifest_sha256.

    Raises:
        InputError: no such file, not a checkpoint (files that would run code are refused), or an incomplete one.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    if config.get("network") == "dual":
        raise InputError(f"{path}: holds the dual network of stage 4; expected a model of stage 2 (NS) or 8 (DMU_scl)")
    network = build_network(config)
    try:
        network.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit its own config ({config['backbone']})") from error
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise InputError(f"{path}: its weights are not all finite numbers; train it again")  # it would find nothing
    return fold_batch_norms(network.to(device, memory_format=torch.channels_last)), config


def build_network(config: dict[str, Any]) -> SearchNetwork:
    """The network that a checkpoint's config describes, with random weights."""
    return SearchNetwork(config["backbone"], config["stride"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours: a dict with at least model (state dict) and config.

    Raises:
        InputError: as `load_network`.
    """
    checkpoint = read_tensors(path)
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "model" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of this project (expected model and config in it)")
    wanted = ("backbone", "stride", "patch_size", "um_per_px", "normalise_stain", "threshold", "classes")
    absent = [key for key in wanted if key not in config]
    if absent:
        raise InputError(f"{path}: its config lacks {', '.join(absent)}; train it again")
    if config["classes"] != list(CLASSES):
        raise InputError(f"{path}: its classes are {str(config['classes'])[:60]}, expected {list(CLASSES)}")
    strange = [key for key, value in config.items() if not _is_sound(key, value)]
    if strange:
        value = str(config[strange[0]])[:60]
        raise InputError(f"{path}: its config has {strange[0]} {value!r}; train it again")
    return checkpoint


def _is_sound(key: str, value: Any) -> bool:
    """Whether a config may have this value; keys that no reader looks at may have any."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("stride", "patch_size"):
        return isinstance(value, int) and is_number and 0 < value <= 4096
    if key == "um_per_px":
        return value is None or (is_number and value >= 0)  # none: patches of unknown resolution
    if key in ("threshold", "offset", "background"):
        return is_number
    if key == "temperature":
        return is_number and value > 0
    if key == "val_curve":
        columns = list(value.values()) if isinstance(value, dict) else []
        return (
            isinstance(value, dict)
            and {"threshold", "precision", "recall"} <= value.keys()
            and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
            and all(isinstance(number, float | int) for column in columns for number in column)
        )
    return isinstance(value, {"backbone": str, "normalise_stain": bool}.get(key, object))


def read_tensors(path: Path) -> Any:
    """Read tensors and plain types that torch saved, onto the CPU; InputError where a file holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a training script writes it (stage 2: NS/sigle.py); name another with "
            "--model_path, or leave out --resume"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the unpickler raise anything
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint, or one that would run code ({reason})") from error


def check_same_run(path: Path, checkpoint: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise InputError where the checkpoint is none to resume from, or was begun with other settings or patches."""
    if not {"settings", "optimizer", "log"} <= checkpoint.keys() or "manifest_sha256" not in checkpoint["config"]:
        raise InputError(f"{path}: a model, expected the last.pt of an interrupted training; leave out --resume")
    if checkpoint["config"]["manifest_sha256"] != config["manifest_sha256"]:
        raise InputError(f"{path}: was trained on another manifest than {settings['manifest']}; leave out --resume")
    for name, value in settings.items():
        if checkpoint["settings"].get(name) != value:
            raise InputError(f"{path}: was begun with --{name} {checkpoint['settings'].get(name)}, not {value}")


def load_backbone_weights(network: SearchNetwork, path: Path) -> dict[str, Tensor] | None:
    """Start the backbone from weights on disk: a checkpoint of stage 2 or 8, or a timm state dict, whole or cut.

    Of a checkpoint the head stays out: only what the backbone has learned carries over to another training.

    Returns:
        The weights of a checkpoint that fits the whole network, head included, for `blend`; None of any other file.

    Raises:
        InputError: unreadable file, or weights of another backbone: every tensor the backbone has must be there.
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


def blend(trained: dict[str, Tensor], start: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights this share of the way back from the trained ones to those the training started from.

    What fine-tuning gains on its own slides, and what the start knew of others, are both kept (Wortsman et al. 2022,
    "Robust fine-tuning of zero-shot models").
    """
    return {
        name: tensor.lerp(start[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }
