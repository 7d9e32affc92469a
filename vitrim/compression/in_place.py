"""Prunes a live model in place: no files are written, and the caller gets no copy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.compression.dtypes import check_result, too_large, typed_as
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.data.inputs import check_repeatable
from vitrim.data.pixels import usable
from vitrim.methods import Method
from vitrim.models.given import check_weights, unwrapped, with_values
from vitrim.models.load import origin_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.surgery import Plan
from vitrim.torch_state import own_torch_state

log = logging.getLogger("vitrim")


@own_torch_state()
def prune_(
    model: nn.Module,
    method: str | Method = "dgmr",
    batches: Sequence[Tensor] | None = None,
    *,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    hidden_dim: int | None = None,
    repair: RepairOptions | bool | None = None,
    scope: str | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Plan:
    """Prune a model in place.

    At most one of `params_ratio`, `macs_ratio`, `mlp_ratio`, `keep_ratio` and `hidden_dim` sets the size; by default
    half of the encoder's parameters stay. Widths are kept exactly as asked.

    Args:
        model: any vision transformer; it is changed. If an error is raised, it may be partly cut.
        method: name of a method, or an instance of a class in `vitrim.methods`.
        batches: preprocessed images (B, C, H, W), for selection and repair; without them only methods that need weights
            alone can run, and nothing is repaired. Images with a value that is not finite, or absurdly large, are left
            out with a warning.
        params_ratio: share of the encoder's parameters that stays.
        macs_ratio: share of the encoder's multiply-accumulates that stays.
        mlp_ratio: hidden width as a multiple of the model width.
        keep_ratio: share of each MLP's hidden units that stays.
        hidden_dim: hidden units that stay in each MLP.
        repair: closed-form repair after the cut: True or options for yes, False for no, None for the method's default.
        scope: dotted path of the part to cut; by default the image tower, or the whole model.
        seed: random seed; equal seeds give equal results.
        quiet: show no progress.

    Returns:
        The plan: what was cut, by paths from the model's root. Where float16 can't hold a value, all of the model is
        float32 afterwards, and a warning says so.

    Raises:
        VitrimError: the model has no MLP, the budget can't be met, the method needs images, or what came out is not
            finite.

    Example:
        >>> import timm
        >>> import vitrim
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
        >>> plan = vitrim.prune_(model, "magnitude", mlp_ratio=1)
        >>> plan.widths
        {'blocks.0.mlp': 192, 'blocks.1.mlp': 192}
    """
    budget = {
        "params_ratio": params_ratio,
        "macs_ratio": macs_ratio,
        "mlp_ratio": mlp_ratio,
        "keep_ratio": keep_ratio,
        "hidden_dim": hidden_dim,
    }
    given = {name: value for name, value in budget.items() if value is not None}
    batches = None if batches is None else usable(batches, "prune_")
    recipe = Recipe.parse({"method": method, **given, "repair": repair, "exact": True, "seed": seed})
    model = with_values(unwrapped(model, in_place=True), in_place=True)
    origin: Origin = origin_of(model)
    check_weights(model, origin.name)
    path, part = resolve_scope(model, scope, origin.encoder)
    encoder, modes = model.get_submodule(path), {name: module.training for name, module in model.named_modules()}
    original = copy.deepcopy(encoder)
    try:
        encoder.float().eval()  # sums and small steps need more than bf16
        teacher = copy.deepcopy(encoder).requires_grad_(False)
        sites = find_mlps(teacher, scope=part.removeprefix(path).removeprefix("."))
        if batches:
            check_repeatable(teacher, origin, batches[0])
        cut = cut_(encoder, teacher, sites, recipe, batches, quiet=quiet)
        check_result(original, encoder)
        for note in cut.notes:
            log.warning("%s", note)
    finally:  # also where an error is raised: the model is the caller's
        why_wide = too_large(original, encoder)
        if why_wide is None:
            typed_as(original, encoder)
        else:
            log.warning(why_wide)
            model.float()
        for name, module in model.named_modules():
            module.training = modes.get(name, model.training)
    return cut.plan.below(path)
