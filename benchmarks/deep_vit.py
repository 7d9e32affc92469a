"""Train a deeper ViT on CIFAR-10 and photos without labels; written as a timm model, for developing and judging repair.

12 blocks of width 192 with layer scale and 4 registers, 32x32 images in 4x4 patches. Masked self-distillation: the
student sees 24 of the 64 patches, in other colours. From these it predicts the tokens that its own running average has
at the hidden patches (mean of the last blocks, as data2vec, arXiv 2202.03555); and the class tokens of two crops of an
image find each other among those of other images (SimCLR, arXiv 2002.05709), which keeps the average from collapsing.
Needs ../shared; test images are not trained on. Repeats on one machine at one number of threads; products are bf16
where the processor is fast in it. A stopped run goes on.

    nice python benchmarks/deep_vit.py                    # 30 minutes on one core alone; benchmarks/models/deep-vit
    python benchmarks/deep_vit.py --steps 4 --batch-size 8 --num-train 64 --num-test 32 --out /tmp/deep  # to see it run
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitrim.data import open_images, transform_for
from vitrim.distributed.precision import has_fast_bf16
from vitrim.metrics.classify import extract, knn_top1
from vitrim.output.load import open_model

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ARCHITECTURE = "vit_tiny_patch16_224"
SIZE, PATCHES, WIDTH, HEADS = 32, 64, 192, 3
MODEL_ARGS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": WIDTH,
    "depth": 12,
    "num_heads": HEADS,
    "mlp_ratio": 4,
    "num_classes": 0,
    "reg_tokens": 4,
    "init_values": 0.1,
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": [3, SIZE, SIZE],
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": 0,
    "first_conv": "patch_embed.proj",
}
VISIBLE, LAST_BLOCKS, TEMPERATURE = 24, 4, 0.2
PHOTO_SHARE, PHOTO_SIZE = 8, 64  # one image of eight is a crop of a photo
WEIGHT_DECAY, WARMUP, MOMENTUM = 0.05, 60, 0.99


def build() -> nn.Module:
    """Return the ViT with random weights."""
    return timm.create_model(ARCHITECTURE, **MODEL_ARGS)


def pixels(path: Path, limit: int, size: int) -> Tensor:
    """Read the middle square of the first images of a parquet file, (N, 3, size, size) bytes."""
    import pyarrow.parquet as pq

    column = pq.read_table(path)
    name = next(name for name in column.column_names if name in ("img", "image"))
    rows = column[name][:limit].to_pylist()
    found = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for place, row in zip(found, rows, strict=True):
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        place.copy_(
            torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
        )
    return found


def crops(images: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Return a random crop of each image, of an area of `least` to 1, half of them mirrored; (B, 3, 32, 32), 0..1."""
    draw = torch.rand(5, len(images), generator=generator)
    side = (least + (1 - least) * draw[0]).sqrt()
    ratio = (0.6 * (draw[1] - 0.5)).exp().sqrt()
    width, height = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    flip = torch.where(draw[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros(len(images))
    x, y = (2 * draw[2] - 1) * (1 - width), (2 * draw[3] - 1) * (1 - height)
    moves = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(moves, [len(images), 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images.float() / 255, grid, align_corners=False)


def coloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images in other colours: brightness, contrast, each channel's gain; a fifth of them grey."""
    draw = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    gains = 0.7 + 0.6 * torch.rand(len(images), 3, 1, 1, generator=generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    changed = ((images - mean) * (0.6 + 0.8 * draw[0]) + mean * (0.7 + 0.6 * draw[1])) * gains
    return torch.where(draw[2] < 0.2, changed.mean(1, keepdim=True), changed).clamp(0, 1)


def choose(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the numbers of the visible and the hidden patches of each image: every second image shows one region."""
    side = int(PATCHES**0.5)
    rank = torch.rand(count, PATCHES, generator=generator)
    centre = torch.rand(count, 2, 1, generator=generator) * (side - 1)
    row, column = torch.arange(PATCHES) // side, torch.arange(PATCHES) % side
    near = torch.maximum((row - centre[:, 0]).abs(), (column - centre[:, 1]).abs()) + 0.01 * rank
    order = torch.where((torch.arange(count) % 2 == 0)[:, None], rank, near).argsort(1)
    return order[:, :VISIBLE], order[:, VISIBLE:]


def picked(tokens: Tensor, places: Tensor) -> Tensor:
    """Return the tokens at the given places of each image."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class Learner(nn.Module):
    """The ViT, with what only training needs: heads for the class token, and a block that fills in hidden patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = build()
        self.project = nn.Sequential(
            nn.Linear(WIDTH, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 128),
            nn.BatchNorm1d(128, affine=False),
        )
        self.places = nn.Parameter(0.02 * torch.randn(1, PATCHES, WIDTH))
        self.fill = Block(WIDTH, HEADS)
        self.read = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def tokens(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return tokens behind the final norm, and the mean of the last blocks' patch tokens, each normalised."""
        prefix = self.vit.num_prefix_tokens
        stream = self.vit._pos_embed(self.vit.patch_embed(2 * images - 1))
        if visible is not None:
            stream = torch.cat([stream[:, :prefix], picked(stream[:, prefix:], visible)], 1)
        total = torch.zeros(())
        for number, block in enumerate(self.vit.blocks):
            stream = block(stream)
            if visible is None and number >= len(self.vit.blocks) - LAST_BLOCKS:
                patches = stream[:, prefix:].float()
                total = total + (patches - patches.mean(1, keepdim=True)) / (patches.std(1, keepdim=True) + 1e-3)
        return self.vit.norm(stream), total

    def targets(self, images: Tensor) -> Tensor:
        """Return what a whole image's patches are, as the last blocks see them."""
        return F.layer_norm(self.tokens(images)[1], [WIDTH])

    def predictions(self, images: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return a direction for each image, and the tokens of the hidden patches, from the visible ones alone."""
        tokens, _ = self.tokens(images, visible)
        prefix = self.vit.num_prefix_tokens
        direction = F.normalize(self.project(tokens[:, 0]).float(), dim=1)
        tokens, visible, hidden = (each[: len(images) // 2] for each in (tokens, visible, hidden))  # of the first crop
        places = self.places.expand(len(tokens), -1, -1)
        seen = tokens[:, prefix:] + picked(places, visible)
        filled = self.fill(torch.cat([tokens[:, :prefix], seen, picked(places, hidden)], 1))
        return direction, self.read(filled[:, -hidden.shape[1] :]).float()


@dataclass(kw_only=True)
class Training:
    """All that changes from step to step; saved and read as one file."""

    student: Learner
    average: Learner
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0

    @classmethod
    def start(cls, seed: int, rate: float) -> Training:
        """Return the state before the first step."""
        torch.manual_seed(seed)
        student = Learner()
        decay = [p for p in student.parameters() if p.ndim > 1]
        plain = [p for p in student.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        return cls(
            student=student,
            average=copy.deepcopy(student).requires_grad_(False),
            optimizer=torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)),
            generator=torch.Generator().manual_seed(seed),
        )

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Write the state; the old one stays until the new one is whole."""
        state = {
            "asked": asked,
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path, asked: dict[str, Any]) -> None:
        """Go on from a file, if there is one of the same run."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["asked"] != asked:
            raise SystemExit(f"{path}: belongs to a run with {state['asked']}; give another --out, or delete it.")
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def learn(state: Training, first: Tensor, second: Tensor, rate: float) -> tuple[float, float]:
    """Take one step on two crops of each image, and return the losses of class tokens and of patches."""
    both = coloured(torch.cat([first, second]), state.generator)
    visible, hidden = choose(len(both), state.generator)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16(torch.device("cpu"))):
        with torch.no_grad():
            patches = state.average.targets(first)
        found, filled = state.student.predictions(both, visible, hidden)
    scores = (found @ found.T / TEMPERATURE).fill_diagonal_(-1e4)
    global_loss = F.cross_entropy(scores, torch.arange(len(both)).roll(len(first)))
    local_loss = F.mse_loss(filled, picked(patches, hidden[: len(first)]))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    (global_loss + local_loss).backward()
    nn.utils.clip_grad_norm_(state.student.parameters(), 1.0)
    state.optimizer.step()
    with torch.no_grad():
        momentum = min(MOMENTUM, (1 + state.step) / (10 + state.step))
        for mine, theirs in zip(state.average.parameters(), state.student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)
    state.step += 1
    return global_loss.item(), local_loss.item()


def train(state: Training, args: argparse.Namespace, checkpoint: Path, asked: dict[str, Any]) -> None:
    """Take all steps that are left, and save every hundredth."""
    images = pixels(DATA / "cifar10" / "train.parquet", args.num_train, SIZE)
    photos = pixels(DATA / "lsp-extended" / "train.parquet", args.num_train, PHOTO_SIZE)
    num_photos, start = max(1, args.batch_size // PHOTO_SHARE), time.perf_counter()
    while state.step < args.steps:
        few = torch.randint(len(photos), (num_photos,), generator=state.generator)
        many = torch.randint(len(images), (args.batch_size - num_photos,), generator=state.generator)
        first, second = (
            torch.cat([crops(images[many], 0.3, state.generator), crops(photos[few], 0.1, state.generator)])
            for _ in range(2)
        )
        warm, done = (state.step + 1) / WARMUP, state.step / args.steps
        rate = args.rate * min(1.0, warm) * (1 - done**2)
        found = learn(state, first, second, rate)
        if state.step % args.every == 0 or state.step == args.steps:
            state.save(checkpoint, asked)
            seconds = time.perf_counter() - start
            print(f"step {state.step}  class {found[0]:.3f}  patches {found[1]:.3f}  {seconds:.0f} s", flush=True)


def write_model(vit: nn.Module, out: Path) -> None:
    """Write the weights and the config in timm's `local-dir:` layout."""
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": WIDTH,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": PRETRAINED_CFG,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: value.detach().contiguous() for name, value in vit.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def neighbours(model: nn.Module, num_train: int, num_test: int) -> float:
    """Return kNN top-1 of the pooled features in percent, from training to test images of CIFAR-10."""
    sides = []
    for name, limit in (("train", num_train), ("test", num_test)):
        images = open_images(DATA / "cifar10" / f"{name}.parquet", transform=transform_for(model), limit=limit)
        sides += extract(model, images.loader(batch_size=250))
    return 100 * knn_top1(*sides, k=min(20, len(sides[0])))


def main() -> None:
    """Train, write, load what was written, and measure that against random weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "models" / "deep-vit")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--num-train", type=int, default=50_000, help="images of CIFAR-10, and photos, at most")
    parser.add_argument("--num-test", type=int, default=2000, help="for kNN, from at most 10,000 training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    unasked = ("out", "num_test", "every")
    asked = {name: value for name, value in vars(args).items() if name not in unasked}
    checkpoint, state = args.out / "training.pt", Training.start(args.seed, args.rate)
    state.resume(checkpoint, asked)
    train(state, args, checkpoint, asked)
    write_model(state.average.vit, args.out)
    loaded, _ = open_model(f"local-dir:{args.out}")
    torch.manual_seed(args.seed)
    fresh = build().eval()
    fresh.pretrained_cfg = loaded.pretrained_cfg
    scores = {
        name: neighbours(model, min(10_000, args.num_train), args.num_test)
        for name, model in (("trained", loaded), ("random", fresh))
    }
    print(
        f"kNN top-1 on {args.num_test} test images: {scores['trained']:.1f}%, of random weights {scores['random']:.1f}%"
    )
    print(f"wrote {args.out}: config.json, model.safetensors; training.pt is needed only to go on")


if __name__ == "__main__":
    main()
