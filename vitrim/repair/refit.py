"""Refits the tensors of one cut MLP together, on the target that selection and least squares already aimed at.

Least squares moves only the output projection; here the input projections and the inner norm move too, by a short run
on cached tokens, behind which least squares has the last word. A step is a share of each weight's own norm
(`relative_steps.py`), and which share is found by trying: steps that serve an MLP of which a quarter stays destroy one
that loses little. The result is taken only if it is better on held-out calibration images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, Tokens
from vitrim.calibrate.walk import Sums
from vitrim.distributed.precision import has_fast_bf16
from vitrim.errors import ModelError
from vitrim.ops.least_squares import fit_output, ridge_for
from vitrim.repair.relative_steps import RelativeSteps, descend_, gated_weights
from vitrim.share import ALONE, Share
from vitrim.surgery import hidden_and_output, mlp_output, read_weights, submodule, weight_of
from vitrim.types import MlpSite

log = logging.getLogger("vitrim")
# A held-out error below this share of the target's energy is rounding: nothing is left to refit.
EXACT = 1e-9
# Below this share, what bfloat16 rounds is no longer small beside the error, so products stay in float32.
COARSE = 1e-3
BATCH_TOKENS = 4096  # tokens of a step
# Step sizes to try, as shares of each weight's norm, and the part of the steps that each trial takes.
SHARES, TRIAL = (0.03, 0.01, 0.003, 0.001), 0.1


def refit_(
    student: nn.Module,
    visit: SiteVisit,
    *,
    num_steps: int = 300,
    batch_tokens: int = BATCH_TOKENS,
    lr: float | None = None,
    ridge: float = 1e-4,
    seed: int = 0,
) -> tuple[float, float]:
    """Refit one MLP in place; never worse on the held-out tokens.

    Args:
        student: the model whose site is already cut and repaired.
        visit: the site with its cached tokens.
        num_steps: number of steps, trials included.
        batch_tokens: tokens a step.
        lr: largest step as a share of each weight's norm; None finds it.
        ridge: of the least squares at the end.
        seed: of the order of tokens.

    Returns:
        Mean squared error on held-out tokens before and after.
    """
    site, share = visit.site, visit.share
    weights = dict(site_parameters(student, site))
    output = weights[f"{site.output}.weight"]
    device = output.device
    scale_D = 1.0 if visit.scale_D is None else visit.scale_D.to(device)
    squares = (float((lane.targets_ND.to(device) * scale_D).square().sum()) for lane in visit.fit.lanes)
    energy = share.total(sum(squares)) / visit.fit.num_all
    judge = partial(_held_out_error, student, visit, scale_D)
    with torch.no_grad():
        coarse = has_fast_bf16(device) and judge() > COARSE * energy

    draws = _Draws(visit.fit, min(batch_tokens, visit.fit.num_all), seed)

    def losses() -> Iterator[Tensor]:
        for inputs_ND, targets_ND in draws.next():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=coarse):
                predicted = mlp_output(student, site, inputs_ND.to(device))
            yield ((predicted.float() - targets_ND.to(device)) * scale_D).square().sum() / draws.size

    return improve_(
        submodule(student, site.path),
        list(weights.values()),
        losses=losses,
        judge=judge,
        num_steps=num_steps,
        lr=lr,
        share=share,
        exact=EXACT * energy,
        where=site.path,
        gated=gated_weights([site], weights),
        scales_M=None if visit.scale_D is None else {output: visit.scale_D},
        dtype=torch.bfloat16 if coarse else torch.float32,
        finish_=partial(_solve_output_, student, visit, ridge),
    )


class _Draws:
    """Batches of tokens, the same ones for any number of processes; each gets those of a batch that it holds.

    Args:
        tokens: what is drawn from.
        size: tokens of a batch, over all processes.
        seed: of their order.
    """

    def __init__(self, tokens: Tokens, size: int, seed: int) -> None:
        self.tokens, self.size = tokens, size
        self.generator = torch.Generator().manual_seed(seed)
        self.places = [torch.full((tokens.num_all,), -1) for _ in tokens.lanes]
        for places, lane in zip(self.places, tokens.lanes, strict=True):
            places[lane.numbers_N] = torch.arange(len(lane.numbers_N))

    def next(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of the next batch, lane by lane."""
        drawn = torch.randint(self.tokens.num_all, (self.size,), generator=self.generator)
        for places, lane in zip(self.places, self.tokens.lanes, strict=True):
            rows = places[drawn]
            rows = rows[rows >= 0]
            if len(rows):
                yield lane.inputs_ND[rows], lane.targets_ND[rows]


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The lowest held-out error so far, the parameters that had it, and the rate that led there."""

    error: float
    values: Sequence[Tensor]
    rate: float | None = None


def improve_(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    losses: Callable[[], Iterable[Tensor]],
    judge: Callable[[], float],
    num_steps: int,
    where: str,
    lr: float | None = None,
    exact: float = 0.0,
    finish_: Callable[[], None] | None = None,
    share: Share = ALONE,
    **sizes: Any,
) -> tuple[float, float]:
    """Train parameters of a module in place by a short run, and keep the best of what was met on held-out data.

    Without a rate, the first steps try some, from large to small, each from the start; the run goes on from the best
    trial with its rate, and is left out if no trial was better than the start.

    Args:
        module: held in eval mode; its other parameters take no gradients.
        parameters: the parameters to train.
        losses: draws a batch and yields the parts of its loss, of which the loss over all processes is the sum.
        judge: returns the error on held-out data.
        num_steps: number of steps, trials included.
        where: path of what is trained, for messages.
        lr: largest step as a share of each weight's norm; None finds it.
        exact: an error up to this counts as none, and nothing is trained.
        finish_: what is done to the parameters behind the steps, and kept where it helps.
        share: of the data, where processes train together; then `judge` has to say the same on each.
        sizes: the keyword arguments of `RelativeSteps`.

    Returns:
        The error before and after. A run that is interrupted is undone, too.

    Raises:
        ModelError: the error before is not finite, so that nothing could be compared with it.
    """
    training = _Training(
        module=module, parameters=parameters, losses=losses, judge=judge, finish_=finish_, share=share, sizes=sizes
    )
    with _only(module, parameters):
        start = training.look()
        if not math.isfinite(start.error):
            raise ModelError(
                f"{where}: the held-out error is {start.error:g} before anything was trained; look at the model."
            )
        if start.error <= exact:
            return start.error, start.error
        try:
            best, left = (replace(start, rate=lr), num_steps) if lr else training.try_rates_(start, num_steps)
            if best.rate is not None and left > 0:
                found = training.run_(best, best.rate, left)
                if not math.isfinite(found.error):
                    said = "%s: training diverged (error %g) and was undone; lower its learning rate, %g."
                    log.warning(said, where, found.error, best.rate)
                best = found if found.error < best.error else best
        except BaseException:
            _put_(parameters, start.values)
            raise
        _put_(parameters, best.values)
    return start.error, best.error


@dataclass(kw_only=True)
class _Training:
    """Short runs over the same parameters; each begins at values that are given."""

    module: nn.Module
    parameters: Sequence[nn.Parameter]
    losses: Callable[[], Iterable[Tensor]]
    judge: Callable[[], float]
    finish_: Callable[[], None] | None
    share: Share
    sizes: Mapping[str, Any]

    @torch.no_grad()
    def look(self, rate: float | None = None) -> _Best:
        """Return the parameters as they are, with their error."""
        return _Best(error=self.judge(), values=[p.detach().clone() for p in self.parameters], rate=rate)

    def run_(self, start: _Best, rate: float, num_steps: int) -> _Best:
        """Train from the start; return where it ended, or what the finish made of that if it is better."""
        _put_(self.parameters, start.values)
        steps = RelativeSteps(self.module, self.parameters, mean=self.share.total, **self.sizes)
        try:
            given = {"peak": rate, "num_steps": num_steps, "share": self.share}
            descend_(steps, self.parameters, self.losses, **given)
        finally:
            steps.close()
        found = self.look(rate)
        if self.finish_ is None or not math.isfinite(found.error):
            return found
        self.finish_()
        finished = self.look(rate)
        return finished if finished.error < found.error else found

    def try_rates_(self, start: _Best, num_steps: int) -> tuple[_Best, int]:
        """Try rates from large to small until one is worse than the one before it, which has improved on the start.

        Returns:
            The best that was met (without a rate if that is the start), and how many steps are left.
        """
        best, left, num = start, num_steps, max(1, int(TRIAL * num_steps))
        for rate in SHARES:
            if left < num:
                break
            found, left = self.run_(start, rate, num), left - num
            if found.error >= best.error and best.rate is not None:
                break
            best = found if found.error < best.error else best
        return best, left


@torch.no_grad()
def _put_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters the values that were kept."""
    for p, kept in zip(parameters, values, strict=True):
        p.copy_(kept)


@torch.no_grad()
def _solve_output_(student: nn.Module, visit: SiteVisit, ridge: float) -> None:
    """Fit the output projection to the cached tokens by least squares, as the rest of the MLP is now."""
    site, sums, own = visit.site, Sums(share=visit.share), site_parameters(student, visit.site)
    device = own[f"{site.output}.weight"].device
    for inputs, targets in _chunks(visit.fit):
        hidden, _ = hidden_and_output(student, site, inputs.to(device))
        sums.add(hidden, targets.to(device))
    weights, stats = read_weights(student, site), sums.done(site.path)
    keep = torch.arange(weights.num_units)
    ridge = ridge_for(stats.num_tokens, len(keep), ridge)
    weight_DK, bias_D = fit_output(stats, keep, weights.output_DH, weights.output_bias_D, ridge=ridge, where=site.path)
    weight_of(student, site.output).copy_(weight_DK)
    if bias_D is not None:
        own[f"{site.output}.bias"].copy_(bias_D)


def site_tensors(model: nn.Module, site: MlpSite) -> dict[str, Tensor]:
    """Return copies of `site_parameters`."""
    return {name: p.detach().clone() for name, p in site_parameters(model, site).items()}


@contextmanager
def _only(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters take gradients, in eval mode (no dropout), and put modes and flags back at the end."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(p, p.requires_grad) for p in {**dict.fromkeys(module.parameters()), **dict.fromkeys(parameters)}]
    module.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        for p in parameters:
            p.grad = None


def site_parameters(model: nn.Module, site: MlpSite) -> dict[str, nn.Parameter]:
    """Return the parameters of a site's layers, by full name, in a fixed order."""
    paths = [path for path in (site.gate, site.value, site.norm, site.output) if path is not None]
    found = ((path, submodule(model, path).named_parameters(recurse=False)) for path in paths)
    return {f"{path}.{name}": p for path, parameters in found for name, p in parameters}


def _chunks(tokens: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets of a lane, or of some of its tokens, at a time."""
    for lane in tokens.lanes:
        yield from zip(lane.inputs_ND.split(8192), lane.targets_ND.split(8192), strict=True)


def _held_out_error(student: nn.Module, visit: SiteVisit, scale_D: Tensor | float) -> float:
    """Compute the mean squared error on the held-out tokens of all processes, in chunks."""
    total, device = 0.0, weight_of(student, visit.site.output).device
    for inputs, targets in _chunks(visit.held_out):
        error = (mlp_output(student, visit.site, inputs.to(device)) - targets.to(device)) * scale_D
        total += float(error.square().sum())
    return visit.share.total(total) / visit.held_out.num_all
