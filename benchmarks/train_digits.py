"""Train the small ViT that ships with vitrim on scikit-learn's handwritten digits; write it as a timm model.

It is vitrim's default model: it needs no download, so every command can be tried on it. The first 1437 images
train, the last 360 test. The test images choose nothing: the state after the last epoch is what is written.

    python benchmarks/train_digits.py --out vitrim/assets/digits-vit
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

NUM_TRAIN = 1437
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 6,
    "mlp_ratio": 4,
    "num_classes": 10,
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": [3, 32, 32],
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": 10,
    "label_names": [str(digit) for digit in range(10)],
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
README = """\
# digits-vit: the model that ships with vitrim

- What: a ViT of {num_parameters:,} parameters (width 96, 6 blocks, MLP 384, 4x4 patches), 10 digits.
- How made: `{command}` on the first 1437 digits of scikit-learn.
- Measured: top-1 accuracy {accuracy:.2f}% on the last 360 digits, after loading the written file in float32.
- Stored as float16: the weights were rounded before they were measured, so float32 holds them exactly.
- Licence: Apache-2.0. The images are not included; they come from `sklearn.datasets.load_digits`.
"""


def load_images() -> tuple[list[Image.Image], Tensor]:
    """Read the 1797 digits as 8x8 RGB images, and their labels."""
    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image).convert("RGB") for image in pixels], torch.from_numpy(digits.target).long()


def augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Shift, rotate, shear and scale each image a little; digits are not flipped.

    Args:
        images: normalised images, background -1, (B, 3, H, W).
        generator: where the random numbers come from.

    Returns:
        Images of the same shape.
    """
    uniform = 2 * torch.rand(6, len(images), generator=generator) - 1
    angle, shear = uniform[0] * math.radians(14), uniform[1] * 0.15
    scale_x, scale_y = 1 + 0.14 * uniform[2], 1 + 0.14 * uniform[3]
    rows = [
        torch.stack([scale_x * angle.cos(), -scale_y * angle.sin() + shear, 0.25 * uniform[4]], dim=1),
        torch.stack([scale_x * angle.sin(), scale_y * angle.cos(), 0.20 * uniform[5]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    gain = 1 - 0.3 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (moved + 1) * gain - 1


@torch.no_grad()
def measure_accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def train(model: torch.nn.Module, images: Tensor, labels: Tensor, *, args: argparse.Namespace) -> None:
    """Train `model` in place: AdamW, five epochs of warm-up, then a cosine to zero."""
    generator = torch.Generator().manual_seed(args.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate)
    steps_per_epoch = len(images) // args.batch_size
    num_steps, num_warmup = args.epochs * steps_per_epoch, 5 * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / num_warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps))),
    )
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for picks in order[: steps_per_epoch * args.batch_size].split(args.batch_size):
            logits = model(augment(images[picks], generator=generator))
            loss = F.cross_entropy(logits, labels[picks], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:3d}  loss {total / steps_per_epoch:.4f}  {seconds:5.0f} s", flush=True)


def write_model(model: torch.nn.Module, out: Path) -> None:
    """Write the weights as float16 and the config in timm's `local-dir:` layout."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": MODEL_ARGS["embed_dim"],
        "model_args": MODEL_ARGS,
        "pretrained_cfg": PRETRAINED_CFG,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    # Not `save_file`: it makes the file readable by its owner only, and wheels keep that mode.
    (out / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def main() -> None:
    """Train, write, load what was written, measure that."""
    parser = argparse.ArgumentParser(description="Train the small digits ViT that ships with vitrim.")
    parser.add_argument("--out", type=Path, default=Path("vitrim/assets/digits-vit"), help="directory to write")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 repeats best across machines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
    transform: Any = create_transform(**resolve_data_config(PRETRAINED_CFG))
    pictures, labels = load_images()
    images = torch.stack([transform(picture) for picture in pictures])
    train(model, images[:NUM_TRAIN], labels[:NUM_TRAIN], args=args)

    write_model(model, args.out)
    loaded = timm.create_model(f"local-dir:{args.out}", pretrained=True)
    accuracy = measure_accuracy(loaded, images[NUM_TRAIN:], labels[NUM_TRAIN:])
    num_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    options = f"--epochs {args.epochs} --batch-size {args.batch_size} --rate {args.rate} --seed {args.seed}"
    command = f"python benchmarks/train_digits.py {options}"
    readme = README.format(num_parameters=num_parameters, command=command, accuracy=accuracy)
    (args.out / "README.md").write_text(readme)
    size_mb = (args.out / "model.safetensors").stat().st_size / 1e6
    print(f"top-1 on the last 360 digits: {accuracy:.2f}%")
    print(f"wrote {args.out}: config.json, model.safetensors ({size_mb:.2f} MB, float16), README.md")


if __name__ == "__main__":
    main()
