"""Estimates of what a run takes, from shapes alone and before it starts: memory, disk and time."""

from __future__ import annotations

import copy
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor, nn

from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError
from vitrim.inputs import run_on
from vitrim.methods import SiteMethod
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.ops.products import CHUNK_TOKENS, TILE_ROWS
from vitrim.storage.tensor_files import CHUNK_BYTES
from vitrim.surgery import channels_last
from vitrim.types import MlpSite

LOG = logging.getLogger("vitrim")

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
    """Estimate of the memory that calibration takes beside the running program.

    Attributes:
        activations: bytes of the blocks' inputs and outputs for all images; they may be offloaded to disk.
        resident: bytes of the weights outside the blocks and of the largest block, for teacher and student.
        sample: bytes of the tokens kept for the refit.
        batch: bytes of the activations of one batch.
        chunk: tokens that are added to the sums at a time.
        hidden: hidden units of the widest MLP.
        kept: units that stay of the MLP that keeps the most.
        d_model: largest model width.
    """

    activations: int
    resident: int
    sample: int
    batch: int
    chunk: int
    hidden: int
    kept: int
    d_model: int

    def bytes(self, *, offloaded: bool, moments: torch.dtype) -> int:
        """Return the bytes of the peak: while moments are summed up, or while units are selected by them.

        Args:
            offloaded: whether the blocks' inputs and outputs are kept on disk.
            moments: type in which the (H, H) sums are kept.
        """
        square, cross = self.hidden**2 * moments.itemsize, self.hidden * self.d_model * 8
        tiles = min(TILE_ROWS, self.hidden) * self.hidden * (4 if moments == torch.float64 else 20)
        summing = self.batch + self.chunk * (self.hidden + 2 * self.d_model) * 8 + tiles
        selecting = square + self.hidden * self.kept * 8 + 5 * cross  # centred moments, factor, residual and copies
        # With targets, and with the part of them that is feedback.
        fixed = square + 2 * cross + self.resident + self.sample + (0 if offloaded else self.activations)
        return int(MARGIN * (fixed + max(summing, selecting)))

    @property
    def choices(self) -> list[tuple[bool, torch.dtype]]:
        """Pairs of (offloaded, moments) that `bytes` takes, the best first: exact moments before rounded ones."""
        return [(offloaded, dtype) for dtype in (torch.float64, torch.float32) for offloaded in (False, True)]

    @property
    def least(self) -> int:
        """Bytes of the choice that takes the fewest."""
        return min(self.bytes(offloaded=offloaded, moments=moments) for offloaded, moments in self.choices)


def estimate_memory(
    sites: Sequence[MlpSite],
    widths: Collection[int],
    repair: RepairOptions | None,
    encoder: nn.Module,
    inputs: Tensor,
    *,
    num_images: int,
    batch_size: int,
) -> MemoryEstimate:
    """Estimate the memory that calibration takes.

    Args:
        sites: the MLPs that are cut, by paths from the encoder.
        widths: hidden units that stay in each of them.
        repair: the repair that follows, if any.
        encoder: the model; not changed. On the meta device only its shapes are followed.
        inputs: one image (C, H, W), or one row of token ids (N,); its values don't matter.
        num_images: how many images calibration reads.
        batch_size: images in a batch.
    """
    tokens = tokens_per_site(encoder, inputs, sites)
    repair = repair or RepairOptions()
    widest = max(num * site.d_model for site, num in zip(sites, tokens, strict=True))
    busiest = max(num * _values_of(site) for site, num in zip(sites, tokens, strict=True))
    blocks = {
        site.block: sum(p.numel() for p in encoder.get_submodule(site.block).parameters())
        for site in find_mlps(encoder)  # those that are not cut are read when they run, too
    }
    outside = sum(p.numel() for p in encoder.parameters()) - sum(blocks.values())
    d_model = max(site.d_model for site in sites)
    return MemoryEstimate(
        activations=3 * num_images * widest * 4,  # inputs of both models, and the teacher's outputs
        resident=2 * (max(outside, 0) + max(blocks.values())) * 4,
        sample=int(1.25 * min(repair.max_tokens, num_images * max(tokens))) * 2 * d_model * 4,
        batch=batch_size * busiest * 4,
        chunk=min(CHUNK_TOKENS, batch_size * max(tokens)),
        hidden=max(site.d_hidden for site in sites),
        kept=max(widths),
        d_model=d_model,
    )


def check_memory(
    encoder: nn.Module,
    sites: Sequence[MlpSite],
    widths: Collection[int],
    recipe: Recipe,
    batches: Sequence[Tensor] | None,
) -> None:
    """Log the memory that a run takes beside its two models, and refuse one that this machine could never hold.

    Args:
        encoder: the teacher, on the device of the run.
        sites: the MLPs that are cut, by paths from the encoder.
        widths: hidden units that stay in each of them.
        recipe: method, repair and training.
        batches: calibration images, if there are any.

    Raises:
        BudgetError: the run takes more than all memory of the device, in use or not.
    """
    step, device = recipe.steps[0], next(encoder.parameters()).device
    method, repair = step.make_method(), step.repair_options()
    bytes_of = {"training": 16 * sum(p.numel() for p in encoder.parameters())}  # gradients, two moments, the best state
    if not recipe.training:
        bytes_of = {}
    if batches and isinstance(method, SiteMethod) and (method.needs == "images" or repair is not None):
        num_images, size = sum(map(len, batches)), len(batches[0])
        estimate = estimate_memory(
            sites, widths, repair, encoder, batches[0][0], num_images=num_images, batch_size=size
        )
        halves = 0 if repair is None else 8 * estimate.hidden**2  # the sums over half of the images
        bytes_of["calibration"] = halves + replace(estimate, resident=0).bytes(offloaded=False, moments=torch.float64)
    if not bytes_of or device.type not in ("cpu", "cuda"):
        return
    most = max(bytes_of, key=lambda step: bytes_of[step])
    said = f"{most} needs about {show_bytes(bytes_of[most])} of {device.type} memory beside the models"
    free, total = _memory_of(device)
    if bytes_of[most] > total:
        raise BudgetError(
            f"{said}, there are {show_bytes(total)}; lower calibrate.num_images or calibrate.batch_size, or use "
            "prune-checkpoint with --memory-budget."
        )
    LOG.info("%s, %s are free", said, show_bytes(free))


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Return the free bytes of a device's memory, and all of them; swap counts as memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total + psutil.swap_memory().total


def selection_bytes(site: MlpSite, width: int, itemsize: int) -> int:
    """Estimate the bytes that selecting a site's units by weights alone takes: its tensors and the working copies.

    Args:
        site: the MLP.
        width: units to keep.
        itemsize: bytes of one value in the file.
    """
    row = site.d_model * (1 if site.kind == "plain" else 2)
    weights = site.d_hidden * (row + site.d_model) * itemsize
    rows = site.d_hidden * row * itemsize if row > site.d_model else 0  # gate and value side by side
    working = 8 * (width * row + 6 * 2048 * row)  # the basis, and rows in float64 some at a time
    return weights + max(rows + working, 2 * site.d_hidden * row * itemsize)  # or the check for NaN


def copying_bytes(largest: int) -> int:
    """Estimate the bytes that copying tensors between files takes, from the bytes of the largest one that is cut."""
    return 2 * largest + CHUNK_BYTES


def selection_seconds(sites: Sequence[MlpSite], widths: Sequence[int]) -> float:
    """Estimate the seconds that selection by weights alone takes on this machine, from a short timed product."""
    rate, total = _flops_per_s(), 0.0
    for site, width in zip(sites, widths, strict=True):
        row = site.d_model * (1 if site.kind == "plain" else 2)
        total += PRODUCTS * 2 * site.d_hidden * row * width / rate + PICK_S * width
    return total


def program_bytes() -> int:
    """Return the most bytes that this process has held so far: the libraries, and an architecture without weights."""
    if sys.platform == "win32":
        return PROGRAM_BYTES
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_bytes(text: str | int) -> int:
    """Parse a size such as 4GB, 512MiB or 1000000 into bytes.

    Raises:
        RecipeError: the text is no size above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise RecipeError(f"size: {text!r} is no size; write a number of bytes, or a size such as 4GB or 512MiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show_bytes(count: int) -> str:
    """Format bytes for people, such as 1.24 GB, rounded up."""
    unit, name, digits = (10**9, "GB", 2) if count >= 10**8 else (10**6, "MB", 1)
    return f"{math.ceil(count / unit * 10**digits) / 10**digits:.{digits}f} {name}"


def show_seconds(seconds: float) -> str:
    """Format seconds for people, as seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _values_of(site: MlpSite) -> int:
    """Count the values held at once for a token: of the teacher's block, and of the student's while its MLP runs."""
    return 8 * site.d_model + (4 if site.kind == "plain" else 6) * site.d_hidden


def _flops_per_s() -> float:
    """Measure floating-point operations a second of float32 products: the best within PROBE_S seconds."""
    square, best, stop = torch.ones(768, 768), 0.0, time.perf_counter() + PROBE_S
    while time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(square, square)
        best = max(best, 2 * len(square) ** 3 / (time.perf_counter() - start))
    return best


def tokens_per_site(encoder: nn.Module, inputs: Tensor, sites: Sequence[MlpSite]) -> list[int]:
    """Count the tokens of an image at each site, by hooks in a forward pass; on meta if any parameter is there."""
    if any(parameter.is_meta for parameter in encoder.parameters()):
        encoder, inputs = copy.deepcopy(encoder).to("meta"), inputs.to("meta")
    first, seen = next(encoder.parameters()), [0] * len(sites)

    def note(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0].numel() // channels_last(layer, args[0]).shape[-1]

        return see

    layers = [encoder.get_submodule(site.value) for site in sites]
    hooks = [layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers)]
    try:
        with evaluating(encoder):
            run_on(encoder, inputs[None].to(first.device, first.dtype if inputs.is_floating_point() else None))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
