"""Repairs one cut MLP: least squares on the sums of calibration, then the short refit of `refit.py`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit
from vitrim.calibrate.walk import JUDGING
from vitrim.config.options import RepairOptions
from vitrim.models.features import evaluating
from vitrim.ops.feedback import fit_judged
from vitrim.ops.least_squares import fit_output, ridge_for, squared_error
from vitrim.repair.learning import judged_halves
from vitrim.repair.refit import refit_, site_parameters, site_tensors
from vitrim.share import ALONE, Share
from vitrim.surgery import KeepUnits, apply_, hidden_and_output, read_weights, weight_of
from vitrim.types import Stats


def repair_(
    student: nn.Module, edit: KeepUnits, visit: SiteVisit, repair: RepairOptions, seed: int
) -> tuple[KeepUnits, dict[str, float]]:
    """Fit by least squares, cut, then refit; return the edit with the resulting tensors, and errors per token."""
    original, site, keep = edit, edit.site, torch.tensor(edit.keep)
    if site.norm is not None:  # a norm over fewer units has other statistics: cut first, then measure them
        apply_(student, [edit])
        site, keep = replace(site, d_hidden=edit.width), torch.arange(edit.width)
        edit, visit = KeepUnits.first(site, edit.width), visit.again()
    weights = read_weights(student, site)
    start_DK, bias_D = weights.output_DH[:, keep.to(weights.output_DH.device)], weights.output_bias_D
    judging = _judging(student, visit) if visit.stands_alone and visit.held_out.num_all else None
    pays = {"held_out": judging, "scale_D": visit.scale_D, "share": visit.share}
    fitted_DK, fitted_D, errors = fitted(visit.stats, keep, start_DK, bias_D, repair.ridge, site.path, **pays)
    apply_(student, [edit.with_output(fitted_DK, fitted_D)])
    if visit.half is not None and visit.stands_alone:
        half_DK, half_D, _ = fitted(visit.half, keep, start_DK, bias_D, repair.ridge, site.path, **pays)
        errors |= judged_halves(student, visit, (half_DK, half_D))
    if repair.refit and visit.stands_alone:
        given = {"num_steps": repair.refit_steps, "lr": repair.refit_lr, "ridge": repair.ridge}
        before, after = refit_(student, visit, **given, seed=seed)
        errors |= {"held_out_repaired": before, "held_out_refitted": after}
    visit.share.give_(site_parameters(student, site).values())
    return replace(original, tensors=site_tensors(student, site)), errors


def fitted(
    stats: Stats,
    keep: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    ridge: float | None,
    where: str,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    scale_D: Tensor | None = None,
    share: Share = ALONE,
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Fit an output projection to the kept units, unless `ridge` is None; return it with its errors per token.

    With `held_out`, hidden values (N, H) and targets (N, D) of tokens that are not in the sums, of `ridge` and
    stronger ones the best there is used, and only as much of the feedback in the targets is taken as pays: `ridge` and
    `feedback` among the errors are what was chosen. `scale_D` is the layer scale behind, `share` that of these tokens.
    """
    errors = {"unrepaired": squared_error(stats, keep, weight_DK, bias_D)}
    if ridge is not None:
        strength = ridge_for(stats.num_tokens, len(keep), ridge)
        given = (stats, keep, weight_DK, bias_D)
        if held_out is None:
            weight_DK, bias_D = fit_output(*given, ridge=strength, where=where)
        else:
            held = {"held_out": held_out, "scale_D": scale_D, "share": share}
            weight_DK, bias_D, chosen = fit_judged(*given, **held, ridge=strength, where=where)
            errors |= chosen
        errors["repaired"] = squared_error(stats, keep, weight_DK, bias_D)
    return weight_DK, bias_D, errors


def _judging(student: nn.Module, visit: SiteVisit) -> tuple[Tensor, Tensor]:
    """Return hidden activations and targets of some held-out tokens, for the student as it is now."""
    weight_DH = weight_of(student, visit.site.output)
    hidden, targets = [weight_DH.new_empty(0, weight_DH.shape[1])], [weight_DH.new_empty(0, weight_DH.shape[0])]
    with evaluating(student):
        for lane in visit.held_out.thinned(JUDGING).lanes:
            hidden.append(hidden_and_output(student, visit.site, lane.inputs_ND.to(weight_DH.device))[0])
            targets.append(lane.targets_ND.to(weight_DH.device))
    return torch.cat(hidden), torch.cat(targets)


def visit_notes(visit: SiteVisit, repair: RepairOptions, num_keep: int) -> list[str]:
    """Return notes on what could not be done at a site because of how its block is built, or for want of images."""
    notes, num_tokens = [], visit.stats.num_tokens
    if num_tokens <= num_keep:
        ridge, more = ridge_for(num_tokens, num_keep, repair.ridge), -(-10 * num_keep // num_tokens)
        notes.append(
            f"{num_tokens:,} calibration tokens can't determine a fit of {num_keep:,} units: its ridge is {ridge:g} "
            f"and its error on the calibration images tells nothing; pass at least {more} times as many images."
        )
    if visit.scale_D is None and repair.feedback > 0:
        notes.append(f"{visit.site.path}: no fixed layer scale behind the MLP, so its target has no feedback.")
    if visit.site.norm is not None:
        notes.append(f"{visit.site.path}: a norm over the hidden units sees other statistics after the cut.")
    if not visit.stands_alone and repair.refit:
        notes.append(f"{visit.site.path}: the MLP can't be run outside its block, so it was not refitted.")
    return notes
