"""Refits the tensors of one cut MLP together, on the target that selection and least squares already aimed at.

Least squares moves only the output projection; here the input projections and the inner norm move too, by a short,
bounded run of Adam on cached tokens. The result is taken only if it is better on held-out calibration images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit
from vitrim.errors import ModelError
from vitrim.surgery import mlp_output, submodule, weight_of
from vitrim.types import MlpSite

log = logging.getLogger("vitrim")
# A held-out error below this share of the target's energy is rounding: nothing is left to refit.
EXACT = 1e-9


def refit_(
    student: nn.Module,
    visit: SiteVisit,
    *,
    num_steps: int = 300,
    batch_tokens: int = 4096,
    lr: float = 1e-2,
    seed: int = 0,
) -> tuple[float, float]:
    """Refit one MLP in place; never worse on the held-out tokens.

    Args:
        student: the model whose site is already cut and repaired.
        visit: the site with its cached tokens.
        num_steps: Adam steps.
        batch_tokens: tokens a step.
        lr: peak learning rate, with a cosine to zero.
        seed: of the order of tokens.

    Returns:
        Mean squared error on held-out tokens before and after.
    """
    site, inputs, targets = visit.site, visit.fit.inputs_ND, visit.fit.targets_ND
    parameters = list(_site_parameters(student, site).values())
    device = parameters[0].device
    scale_D = 1.0 if visit.scale_D is None else visit.scale_D.to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(inputs), (min(batch_tokens, len(inputs)),), generator=generator)
        output = mlp_output(student, site, inputs[rows].to(device))
        return ((output - targets[rows].to(device)) * scale_D).square().sum(-1).mean()

    return improve_(
        submodule(student, site.path),
        parameters,
        loss=loss,
        judge=lambda: _held_out_error(student, visit, scale_D),
        num_steps=num_steps,
        lr=lr,
        exact=EXACT * float(targets.square().sum(1).mean()),
        where=site.path,
    )


def improve_(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    loss: Callable[[], Tensor],
    judge: Callable[[], float],
    num_steps: int,
    lr: float,
    where: str,
    exact: float = 0.0,
    average_: Callable[[Sequence[nn.Parameter]], None] | None = None,
) -> tuple[float, float]:
    """Train parameters of a module in place by a short run of Adam, and undo it unless the error has become lower.

    Args:
        module: held in eval mode; its other parameters take no gradients.
        parameters: the parameters to train.
        loss: draws a batch and returns its loss.
        judge: returns the error on held-out data.
        num_steps: Adam steps.
        lr: peak learning rate, with a cosine to zero.
        where: path of what is trained, for messages.
        exact: an error up to this counts as none, and nothing is trained.
        average_: replaces gradients by their means over the processes, before each step.

    Returns:
        The error before and after. A run that is interrupted is undone, too.

    Raises:
        ModelError: the error before is not finite, so that nothing could be compared with it.
    """
    with _training(module, parameters):
        with torch.no_grad():
            before, after = judge(), math.inf
            start = [p.clone() for p in parameters]
        if not math.isfinite(before):
            raise ModelError(
                f"{where}: the held-out error is {before:g} before anything was trained; look at the model."
            )
        if before <= exact:
            return before, before
        try:
            _descend_(parameters, loss, num_steps=num_steps, lr=lr, average_=average_)
            with torch.no_grad():
                after = judge()
        finally:
            if not after < before:
                with torch.no_grad():
                    for p, kept in zip(parameters, start, strict=True):
                        p.copy_(kept)
    if not math.isfinite(after):
        log.warning("%s: training diverged (error %g) and was undone; lower its learning rate, %g.", where, after, lr)
        after = before
    return before, min(before, after)


def site_tensors(model: nn.Module, site: MlpSite) -> dict[str, Tensor]:
    """Return copies of the parameters of a site's layers, by full name, in a fixed order."""
    return {name: p.detach().clone() for name, p in _site_parameters(model, site).items()}


def _descend_(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    num_steps: int,
    lr: float,
    average_: Callable[[Sequence[nn.Parameter]], None] | None,
) -> None:
    """Take the Adam steps."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=num_steps + 1, pct_start=0.1)
    for _ in range(num_steps):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if average_ is not None:
            average_(parameters)
        optimizer.step()
        schedule.step()


@contextmanager
def _training(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
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


def _site_parameters(model: nn.Module, site: MlpSite) -> dict[str, nn.Parameter]:
    paths = [path for path in (site.gate, site.value, site.norm, site.output) if path is not None]
    found = ((path, submodule(model, path).named_parameters(recurse=False)) for path in paths)
    return {f"{path}.{name}": p for path, parameters in found for name, p in parameters}


def _held_out_error(student: nn.Module, visit: SiteVisit, scale_D: Tensor | float) -> float:
    """Compute the mean squared error on the held-out tokens, in chunks."""
    total, device = 0.0, weight_of(student, visit.site.output).device
    pairs = zip(visit.held_out.inputs_ND.split(8192), visit.held_out.targets_ND.split(8192), strict=True)
    for inputs, targets in pairs:
        error = (mlp_output(student, visit.site, inputs.to(device)) - targets.to(device)) * scale_D
        total += float(error.square().sum())
    return total / len(visit.held_out.inputs_ND)
