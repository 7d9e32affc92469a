"""Trains a small CLIP on CIFAR-10, then runs everything that vitrim does to a pair on it: the table of docs/clip.md.

Captions are made from class names and from how the image was changed: "a blurry photo of a cat". So a caption tells
more than a class, and retrieval has something to find. The chain: cut the image tower to MLP ratio 1, repaired;
distil; zero-shot; retrieval; tune the text tower; write; load with open_clip alone. Needs ../shared (CIFAR-10). Prints
a table and writes JSON with machine, versions, seed and command.

    python benchmarks/tiny_clip.py            # about 20 minutes on 2 cores
    python benchmarks/tiny_clip.py --quick    # a minute, to see that it runs; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import functional as tv

import vitrim
from vitrim.clip.contrastive import contrastive_loss
from vitrim.clip.tasks import retrieval, tune_text, zero_shot
from vitrim.config.recipe import Recipe
from vitrim.data import open_images
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.schedule import rate_shape

SHARED = Path(__file__).resolve().parents[2] / "shared"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LOOKS = ("", "black and white ", "blurry ", "dark ", "bright ", "upside-down ", "negative ", "small ")
TEMPLATES = ("a {look}photo of a {name}.", "a {look}picture of the {name}.", "{name}, a {look}photo.")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 96, "head_width": 32, "patch_size": 8, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
# One image for each class and look: a set in which every caption has one right image.
SET_SIZE = len(CLASSES) * len(LOOKS)


def main() -> None:
    """Train, then run the chain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train-steps", type=int, default=1500, help="of 256 images")
    parser.add_argument("--steps", type=int, default=480, help="of distillation, 128 images each")
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--text-lr", type=float, default=5e-5)
    parser.add_argument("--num-sets", type=int, default=125, help=f"of {SET_SIZE} images, for retrieval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiny_clip.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.train_steps, arguments.steps, arguments.text_steps, arguments.num_sets = 10, 10, 10, 2
    started = time.monotonic()
    bench = Bench(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = bench.run(Path(folder))
    result |= {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    if not arguments.quick:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


class Bench:
    """The images, their captions, and the judge that all rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.seed = arguments, arguments.seed
        data = SHARED / "data" / "cifar10"
        self.train_set = pixels(data / "train.parquet", 2000 if arguments.quick else 50_000)
        self.test_set = pixels(data / "test.parquet", 500 if arguments.quick else 10_000)
        self.batch_size = 32 if arguments.quick else 256
        self.tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])

    def run(self, folder: Path) -> dict[str, Any]:
        """The whole chain, a row for each pair of towers."""
        seconds: dict[str, int] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            began = time.monotonic()
            found = work()
            seconds[name] = round(time.monotonic() - began)
            print(f"{name}: {seconds[name]} s", flush=True)
            return found

        original = timed("training", lambda: self.train(folder / "original"))
        paper = self.compress(original, folder / "paper", method="dgmr-paper")
        cut = timed("cut and repaired", lambda: self.compress(original, folder / "cut"))
        steps = self.arguments.steps
        distilled = timed(
            "cut, repaired, distilled", lambda: self.compress(original, folder / "distilled", steps=steps)
        )
        tuned = timed("text tuning", lambda: self.tune(folder / "distilled", folder / "tuned"))
        fair = self.tune(original, folder / "fair")
        rows = {
            "original": self.row(original, original),
            "cut as published": self.row(paper.out, original),
            "cut and repaired": self.row(cut.out, original),
            "cut, repaired, distilled": self.row(distilled.out, original),
            "the same, text tower tuned": self.row(tuned.out, tuned.out),
            "original, text tower tuned": self.row(fair.out, fair.out),
        }
        for name, found, stage in (
            ("cut as published", paper, "after_cut"),
            ("cut and repaired", cut, "after_cut"),
            ("cut, repaired, distilled", distilled, "after_recovery"),
        ):
            judged = getattr(found.metrics, stage)
            rows[name]["relative_error"] = None if judged is None else judged.relative_error
        stock = timed("stock reload", lambda: self.reload(tuned.out))
        return {"rows": rows, "seconds": seconds, "stock_reload": stock, "text_tuning": tuned.metrics.text_tuning}

    def train(self, folder: Path) -> Path:
        """A pair trained from scratch by CLIP's loss, in open_clip's own folder."""
        folder.mkdir()
        said = {"model_cfg": CONFIG, "preprocess_cfg": {"size": 32, "mean": MEAN, "std": STD}}
        (folder / "open_clip_config.json").write_text(json.dumps(said))
        torch.manual_seed(self.seed)
        model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.arguments.train_steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate_shape(step, self.arguments.train_steps, 0.1)
            images, captions = self.draw(self.batch_size, generator, augment=True)
            found = (
                model.encode_image(images, normalize=True),
                model.encode_text(self.tokenize(captions), normalize=True),
            )
            loss = contrastive_loss(*found, model.logit_scale.exp())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            if step % 100 == 99:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder

    def draw(self, num: int, generator: torch.Generator, *, augment: bool) -> tuple[Tensor, list[str]]:
        """Training images with random looks, and a caption of each."""
        pictures, labels = self.train_set
        rows = torch.randint(len(pictures), (num,), generator=generator)
        looks = torch.randint(len(LOOKS), (num,), generator=generator)
        images = pictures[rows]
        if augment:
            down, right, mirror = torch.randint(9, (3, num), generator=generator)
            padded = nn.functional.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
            images = torch.stack([p[:, d : d + 32, r : r + 32] for p, d, r in zip(padded, down, right, strict=True)])
            images = torch.where((mirror % 2 == 0)[:, None, None, None], images.flip(3), images)
        which = torch.randint(len(TEMPLATES), (num,), generator=generator).tolist()
        texts = [caption(int(labels[row]), int(look), i) for row, look, i in zip(rows, looks, which, strict=True)]
        return normalised(with_looks(images, looks)), texts

    def compress(self, original: Path, out: Path, *, method: str = "dgmr", steps: int | None = None) -> vitrim.Result:
        """Cut the image tower to MLP ratio 1, on images without captions."""
        images, _ = self.draw(200 if self.arguments.quick else 20_000, torch.Generator().manual_seed(1), augment=False)
        recover = None if steps is None else {"steps": steps, "batch_size": self.batch_size // 2, "flip": True}
        options = {"repair": {"refit_steps": 20}, "calibrate": {"num_images": 100}} if self.arguments.quick else {}
        recipe = Recipe.parse({**options, "mlp_ratio": 1, "method": method, "recover": recover, "seed": self.seed})
        return vitrim.compress(str(original), data=list(images), recipe=recipe, out=out, quiet=True)

    def tune(self, source: Path, out: Path) -> Any:
        """Tune the text tower on training images with captions; a fifth judges."""
        images, looks, labels = self.matched(*self.train_set, num_sets=2 if self.arguments.quick else 500)
        pairs = self.pairs(images, looks, labels)
        held_out = pairs[: len(pairs) // 5]
        options = {"steps": self.arguments.text_steps, "batch_size": self.batch_size, "lr": self.arguments.text_lr}
        given = {"options": options, "held_out": held_out, "out": out, "seed": self.seed, "quiet": True}
        return tune_text(str(source), pairs[len(held_out) :], **given)

    def matched(self, pictures: Tensor, labels: Tensor, *, num_sets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sets of images, one for each class and look, no image twice."""
        per_class = num_sets * len(LOOKS)
        rows = torch.stack([(labels == name).nonzero()[:per_class, 0] for name in range(len(CLASSES))])
        rows = rows.view(len(CLASSES), num_sets, len(LOOKS)).transpose(0, 1).flatten()
        looks = torch.arange(len(LOOKS)).repeat(num_sets * len(CLASSES))
        return normalised(with_looks(pictures[rows], looks)), looks, labels[rows]

    def pairs(self, images: Tensor, looks: Tensor, labels: Tensor) -> list[tuple[Tensor, list[str]]]:
        """Images with all captions that fit them."""
        every = range(len(TEMPLATES))
        return [
            (image, [caption(int(label), int(look), i) for i in every])
            for image, look, label in zip(images, looks, labels, strict=True)
        ]

    def row(self, image_from: Path | None, text_from: Path) -> dict[str, Any]:
        """Figures of an image tower with a text tower."""
        (whole, _), (texts, _) = open_model(str(image_from)), open_model(str(text_from))
        given = {"text_from": texts, "tokenizer": self.tokenize, "quiet": True, "batch_size": 250}
        pictures, labels = self.test_set
        data = list(zip(normalised(pictures), labels.tolist(), strict=True))
        templates = [template.format(look="", name="{}") for template in TEMPLATES]
        found = zero_shot(whole, data, names=CLASSES, templates=templates, **given)
        row = {"parameters": sum(p.numel() for p in whole.visual.parameters()), "top1": found["top1"]}
        pairs = self.pairs(*self.matched(*self.test_set, num_sets=self.arguments.num_sets))
        sets = [retrieval(whole, pairs[i : i + SET_SIZE], **given) for i in range(0, len(pairs), SET_SIZE)]
        for way in ("image_to_text", "text_to_image"):
            row[way] = {k: sum(each[way][k] for each in sets) / len(sets) for k in sets[0][way]}
        return row

    def reload(self, folder: Path) -> dict[str, Any]:
        """Load an output with open_clip alone; largest differences of both towers' outputs."""
        stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        ours: Any = vitrim.load(folder)
        stock.eval()
        images, texts = normalised(self.test_set[0][:16]), self.tokenize([caption(i, i % 8, 0) for i in range(10)])
        with torch.inference_mode():
            differences = (
                (stock.encode_image(images) - ours.encode_image(images)).abs().max(),
                (stock.encode_text(texts) - ours.encode_text(texts)).abs().max(),
            )
        mlp = stock.visual.transformer.resblocks[0].mlp
        return {"width": mlp.c_fc.out_features, **dict(zip(("images", "texts"), map(float, differences), strict=True))}


def pixels(path: Path, limit: int) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, 3, 32, 32), and their labels."""
    images = open_images(path, transform=as_bytes, limit=limit)
    batches = list(images.loader(batch_size=1000))
    return torch.cat([b.images_BCHW for b in batches]).to(torch.uint8), torch.cat([b.labels_B for b in batches])


def as_bytes(image: Any) -> Tensor:
    """Pixel values 0..255, as the floats that a data set of images must hold."""
    return tv.pil_to_tensor(image).float()


def with_looks(images: Tensor, looks: Tensor) -> Tensor:
    """Images (N, 3, 32, 32) in 0..255, each changed as the number of its look says."""
    changed = images.float()
    for number, look in enumerate(LOOKS):
        chosen = looks == number
        changed[chosen] = changed_to(look.strip(), changed[chosen])
    return changed


def changed_to(look: str, images: Tensor) -> Tensor:
    """Images that look dark, blurry and so on."""
    if look == "blurry":
        return tv.gaussian_blur(images, kernel_size=[7, 7], sigma=[2.0, 2.0])
    if look == "small":
        return nn.functional.pad(nn.functional.avg_pool2d(images, 2), (8, 8, 8, 8), value=128.0)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "black and white": lambda x: x.mean(1, keepdim=True).expand_as(x),
        "dark": lambda x: 0.35 * x,
        "bright": lambda x: 255 - 0.35 * (255 - x),
        "upside-down": lambda x: x.flip(2),
        "negative": lambda x: 255 - x,
    }
    return ways[look](images)


def normalised(images: Tensor) -> Tensor:
    """Pixels in 0..255 as the model takes them."""
    shape = (1, 3, 1, 1)
    return (images.float() / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def caption(label: int, look: int, template: int) -> str:
    """What an image shows, and how."""
    return TEMPLATES[template].format(look=LOOKS[look], name=CLASSES[label])


def markdown(result: dict[str, Any]) -> str:
    """The table as the docs show it."""
    ways = [f"{way}, recall@1 / 5 / 10" for way in ("image to text", "text to image")]
    lines = [f"| pair | image tower | zero-shot top-1 | {' | '.join(ways)} |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        recalls = [
            " / ".join(f"{value:.1f}" for value in row[way].values()) for way in ("image_to_text", "text_to_image")
        ]
        lines.append(f"| {name} | {row['parameters']:,} | {row['top1']:.2f} | {' | '.join(recalls)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
