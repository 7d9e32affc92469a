"""Low-rank adapters of a weight: W0 + alpha / rank * B A, where B A is trained and W0 is not.

An adapter is a parametrization of the weight itself: whatever reads `layer.weight` (a linear layer, an attention that
passes packed weights to a function, a fused kernel) reads the sum. So no layer is replaced and no foreign `forward` is
touched. The price is memory for the sum beside W0 during a step, which layers that keep the two apart avoid. Which
weights get an adapter is decided in `recover/adapters.py`.

Shapes: weight (M, N), rank R, latent vector Z, hidden units H of a generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Spread of the rows that emit A, relative to A's own: the start stays LoRA's, and the generator still gets a gradient.
SMALL = 0.1


class Adapter(nn.Module, ABC):
    """A parametrization that adds alpha / rank * B A to a weight; a subclass says how A and B are made."""

    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.order: tuple[str, ...] = ()  # of the parameters of the module that the weight is one of

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, N) and B (M, R)."""

    def forward(self, weight_MN: Tensor) -> Tensor:
        """Return the adapted weight in the weight's own dtype.

        The sum is in float32 also under autocast, as it is when adapters are merged.
        """
        with torch.autocast(weight_MN.device.type, enabled=False):
            a_RN, b_MR = self.factors()
            return (weight_MN + (self.alpha / self.rank) * (b_MR @ a_RN)).to(weight_MN.dtype)


class Lora(Adapter):
    """LoRA: A and B are parameters; B starts at zero, A as torch starts a linear layer.

    Paper: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, weight_MN: Tensor, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(rank, alpha)
        num_out, num_in = weight_MN.shape
        self.A = nn.Parameter(_uniform((rank, num_in), num_in, generator).to(weight_MN.device))
        self.B = nn.Parameter(torch.zeros(num_out, rank, device=weight_MN.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, N) and B (M, R)."""
        return self.A, self.B


class OpLora(Adapter):
    """OP-LoRA: a small network makes A and B from a learned vector z, as W2 relu(W1 z + b1) + b2.

    B starts at zero because the rows of W2 and entries of b2 that produce it do. If z or W1 started at zero too, no
    gradient would ever reach W2. A hidden unit that starts dead gets no gradient either; since the network's only input
    is z, the sign of each row of W1 is chosen so that all units start active.

    Paper: OP-LoRA, arXiv 2412.10362; it does not say how to start, so the start is ours. It trains
    R (M + N) (H + 1) + H Z + H + Z values, about H + 1 times as many as LoRA.
    """

    def __init__(
        self, weight_MN: Tensor, *, rank: int, alpha: float, hidden: int, latent: int, generator: torch.Generator
    ) -> None:
        super().__init__(rank, alpha)
        self.num_out, self.num_in = weight_MN.shape
        num_a, num_b = rank * self.num_in, rank * self.num_out
        z_Z = torch.randn(latent, generator=generator)
        w1_HZ = _uniform((hidden, latent), latent, generator)
        w1_HZ = torch.where((w1_HZ @ z_Z)[:, None] < 0, -w1_HZ, w1_HZ)
        w2_a = SMALL * _uniform((num_a, hidden), self.num_in, generator)
        b2_a = _uniform((num_a,), self.num_in, generator)
        self.z, self.W1, self.b1 = nn.Parameter(z_Z), nn.Parameter(w1_HZ), nn.Parameter(torch.zeros(hidden))
        self.W2 = nn.Parameter(torch.cat([w2_a, torch.zeros(num_b, hidden)]))
        self.b2 = nn.Parameter(torch.cat([b2_a, torch.zeros(num_b)]))
        self.to(weight_MN.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Compute A (R, N) and B (M, R)."""
        emitted = self.W2 @ torch.relu(self.W1 @ self.z + self.b1) + self.b2
        a_RN, b_MR = emitted.split([self.rank * self.num_in, self.rank * self.num_out])
        return a_RN.view(self.rank, self.num_in), b_MR.view(self.num_out, self.rank)

    def num_dead(self) -> int:
        """Return how many hidden units are off, and so get no gradient."""
        with torch.no_grad():
            return int((self.W1 @ self.z + self.b1 <= 0).sum())


class Place(NamedTuple):
    """Where a weight is: the path of its layer, the module that holds it, and its name there."""

    path: str
    module: nn.Module
    tensor: str

    @property
    def name(self) -> str:
        """The name that users give it: `blocks.0.attn.qkv`, and for torch's own attention `attn.in_proj`."""
        return f"{self.path}.{self.tensor}".removesuffix("weight").rstrip("._")


def find_adapters(model: nn.Module) -> Iterator[tuple[Place, Adapter]]:
    """Yield each adapter on a model and where it is."""
    for path, module in model.named_modules():
        for tensor, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain[0], Adapter):
                yield Place(path, module, tensor), chain[0]


def attach_adapter_(place: Place, adapter: Adapter) -> None:
    """Put an adapter on a weight; the weight stays the same parameter."""
    adapter.order = tuple(place.module._parameters)
    parametrize.register_parametrization(place.module, place.tensor, adapter)


def merge_adapters_(model: nn.Module) -> None:
    """Write each adapted weight into its layer and remove the adapters; does nothing on a model without any."""
    for place, adapter in reversed(list(find_adapters(model))):
        parametrize.remove_parametrizations(place.module, place.tensor, leave_parametrized=True)
        own = place.module._parameters  # torch puts the weight behind the bias
        for name in adapter.order:
            own[name] = own.pop(name)


def _uniform(shape: tuple[int, ...], num_in: int, generator: torch.Generator) -> Tensor:
    """Draw initial values as torch does for a linear layer with `num_in` inputs, and LoRA for A."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(num_in)
