"""What a run will need, said before it starts: memory, disk and time, from shapes alone."""

from __future__ import annotations

import copy
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor, nn

from vitrim.calibrate.walk import CHUNK_TOKENS, TILE_ROWS
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import SiteMethod, find_method
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.storage.tensor_files import CHUNK_BYTES
from vitrim.types import MlpSite

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Where the system does not say: Python with torch and timm.
PROGRAM_BYTES = 600 * 10**6
# Bytes a second of a slow disk: a laptop's, or one over a network.
DISK_RATE = 200 * 10**6
# Gram-Schmidt on Gaussian weights, which are the worst case, takes a few products of the matrix with its picks, and a
# fixed time for each pick (benchmarks/selection.py, 4304x1152 to 15360x1792: 0.8 to 1.3 of what this gives).
PRODUCTS, PICK_S = 4.0, 6e-4
# What allocators round up and keep: EVA-CLIP-E took 7% more than its arrays add up to (benchmarks/streaming.py).
MARGIN = 1.08
PROBE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that calibration needs beside the running program, and the widths that decide about the rest.

    `streams` may be offloaded to disk; `resident` is what lies outside the blocks and one block, for teacher and
    student each; `sample` the tokens kept for the refit, `batch` one batch's activations; `chunk` tokens are added to
    the sums at a time; `hidden` are the units of the widest MLP and `kept` those that stay.
    """

    streams: int
    resident: int
    sample: int
    batch: int
    chunk: int
    hidden: int
    kept: int
    d_model: int

    def bytes(self, *, offloaded: bool, moments: torch.dtype) -> int:
        """The most at any moment: while moments are summed up, or while units are selected by them."""
        square, cross = self.hidden**2 * moments.itemsize, self.hidden * self.d_model * 8
        tiles = 0 if moments == torch.float64 else 2 * min(TILE_ROWS, self.hidden) * self.hidden * 8
        summing = self.batch + self.chunk * (self.hidden + self.d_model) * 8 + tiles
        selecting = square + self.hidden * self.kept * 8 + 5 * cross  # centred moments, factor, residual and copies
        fixed = square + cross + self.resident + self.sample + (0 if offloaded else self.streams)
        return int(MARGIN * (fixed + max(summing, selecting)))

    @property
    def choices(self) -> list[tuple[bool, torch.dtype]]:
        """Ways to run, the best first: activations offloaded or not, and moments; exact ones before others."""
        return [(offloaded, dtype) for dtype in (torch.float64, torch.float32) for offloaded in (False, True)]

    @property
    def least(self) -> int:
        """Bytes of the way that needs the fewest."""
        return min(self.bytes(offloaded=offloaded, moments=moments) for offloaded, moments in self.choices)


def estimate_memory(
    sites: Sequence[MlpSite],
    recipe: Recipe,
    encoder: nn.Module,
    inputs: Tensor,
    *,
    num_images: int,
    batch_size: int,
) -> MemoryEstimate:
    """What calibration will need.

    Args:
        sites: what is cut, by paths from the encoder.
        recipe: widths and repair.
        encoder: the model; it is not changed. One on the meta device is not run but for its shapes.
        inputs: one image, or one row of token ids; its values play no part.
        num_images: how many there will be.
        batch_size: images a batch.
    """
    tokens = _tokens_of(encoder, inputs, sites)
    repair = recipe.repair_options() or RepairOptions()
    widest = max(num * site.d_model for site, num in zip(sites, tokens, strict=True))
    busiest = max(num * _values_of(site) for site, num in zip(sites, tokens, strict=True))
    blocks = {
        site.block: sum(p.numel() for p in encoder.get_submodule(site.block).parameters())
        for site in find_mlps(encoder)  # those that are not cut are read when they run, too
    }
    outside = sum(p.numel() for p in encoder.parameters()) - sum(blocks.values())
    d_model = max(site.d_model for site in sites)
    return MemoryEstimate(
        streams=3 * num_images * widest * 4,  # inputs of both models, and the teacher's outputs
        resident=2 * (max(outside, 0) + max(blocks.values())) * 4,
        sample=int(1.25 * min(repair.max_tokens, num_images * max(tokens))) * 2 * d_model * 4,
        batch=batch_size * busiest * 4,
        chunk=min(CHUNK_TOKENS, batch_size * max(tokens)),
        hidden=max(site.d_hidden for site in sites),
        kept=max(recipe.width_of(site) for site in sites),
        d_model=d_model,
    )


def check_memory(
    encoder: nn.Module, sites: Sequence[MlpSite], recipe: Recipe, batches: Sequence[Tensor] | None, *, quiet: bool
) -> None:
    """Say what a run in memory needs beside its two models, and refuse one that this machine could never hold.

    Args:
        encoder: the teacher, on the device of the run.
        sites: what is cut, by paths from the encoder.
        recipe: what will be done.
        batches: calibration images, if there are any.
        quiet: say nothing.

    Raises:
        BudgetError: it is more than all memory that there is, in use or not.
    """
    method, device = find_method(recipe.method), next(encoder.parameters()).device
    needed = {"training": 16 * sum(p.numel() for p in encoder.parameters())}  # gradients, two moments, the best state
    if recipe.recover is None and recipe.blockwise is None:
        needed = {}
    if batches and issubclass(method, SiteMethod) and (method.needs == "images" or recipe.repair_options() is not None):
        num_images, size = sum(map(len, batches)), len(batches[0])
        needs = estimate_memory(sites, recipe, encoder, batches[0][0], num_images=num_images, batch_size=size)
        needed["calibration"] = replace(needs, resident=0).bytes(offloaded=False, moments=torch.float64)
    if not needed or device.type not in ("cpu", "cuda"):
        return
    most = max(needed, key=lambda step: needed[step])
    said = f"{most} needs about {show_bytes(needed[most])} of {device.type} memory beside the models"
    free, total = _memory_of(device)
    if needed[most] > total:
        raise BudgetError(
            f"{said}, there are {show_bytes(total)}; lower calibrate.num_images or calibrate.batch_size, or use "
            "prune-checkpoint with --memory-budget."
        )
    if not quiet:
        print(f"{said}, {show_bytes(free)} are free", file=sys.stderr)


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of a device's memory that are free, and all of them; swap counts as memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total + psutil.swap_memory().total


def selection_bytes(site: MlpSite, width: int, itemsize: int) -> int:
    """Memory that picking a site's units on weights alone takes: its tensors, and the working copies.

    Args:
        site: the MLP.
        width: units that stay.
        itemsize: bytes of a value in the file.
    """
    row = site.d_model * (1 if site.kind == "plain" else 2)
    weights = site.d_hidden * (row + site.d_model) * itemsize
    rows = site.d_hidden * row * itemsize if row > site.d_model else 0  # gate and value side by side
    working = 8 * (width * row + 6 * 2048 * row)  # the basis, and rows in float64 some at a time
    return weights + max(rows + working, 2 * site.d_hidden * row * itemsize)  # or the check for NaN


def copying_bytes(largest: int) -> int:
    """Memory that passing tensors through takes, given the bytes of the largest one that is cut."""
    return 2 * largest + CHUNK_BYTES


def selection_seconds(sites: Sequence[MlpSite], widths: Sequence[int]) -> float:
    """Time to pick units on weights alone on this machine, from a short product that is timed."""
    rate, total = _flops_per_s(), 0.0
    for site, width in zip(sites, widths, strict=True):
        row = site.d_model * (1 if site.kind == "plain" else 2)
        total += PRODUCTS * 2 * site.d_hidden * row * width / rate + PICK_S * width
    return total


def program_bytes() -> int:
    """The most memory that this process has held so far: the libraries, and an architecture without weights."""
    if sys.platform == "win32":
        return PROGRAM_BYTES
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_bytes(text: str | int) -> int:
    """A size such as 4GB, 512MiB or 1000000.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise RecipeError(f"size: {text!r} is none; write a number of bytes, or such as 4GB or 512MiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show_bytes(count: int) -> str:
    """A size for people."""
    unit, name, digits = (10**9, "GB", 2) if count >= 10**8 else (10**6, "MB", 1)
    return f"{math.ceil(count / unit * 10**digits) / 10**digits:.{digits}f} {name}"


def show_seconds(seconds: float) -> str:
    """A time for people, no more exact than an estimate is."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _values_of(site: MlpSite) -> int:
    """Values that a token has at once: what is kept of the teacher's block, and the student's while its MLP runs."""
    return 8 * site.d_model + (4 if site.kind == "plain" else 6) * site.d_hidden


def _flops_per_s() -> float:
    """Floating-point operations a second of float32 products: the best of a few that take a fifth of a second."""
    square, best, stop = torch.ones(768, 768), 0.0, time.perf_counter() + PROBE_S
    while time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(square, square)
        best = max(best, 2 * len(square) ** 3 / (time.perf_counter() - start))
    return best


def _tokens_of(encoder: nn.Module, inputs: Tensor, sites: Sequence[MlpSite]) -> list[int]:
    """Tokens an image at each site, seen by hooks in a forward pass, on meta if parameters are there."""
    if any(parameter.is_meta for parameter in encoder.parameters()):
        encoder, inputs = copy.deepcopy(encoder).to("meta"), inputs.to("meta")
    first, seen = next(encoder.parameters()), [0] * len(sites)

    def note(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0].numel() // args[0].shape[-1]

        return see

    layers = [encoder.get_submodule(site.value) for site in sites]
    hooks = [layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers)]
    try:
        with evaluating(encoder):
            encoder(inputs[None].to(first.device, first.dtype if inputs.is_floating_point() else None))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
