"""Decide whether a library's own config can express a model's widths, and find near widths that it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vitrim.models.load import backend_of, build_empty
from vitrim.models.origin import ModelBackend, Origin
from vitrim.models.sites import find_mlps
from vitrim.surgery import DropBlocks, Edit, KeepUnits, reshape_
from vitrim.types import MlpSite

REMOTE_CODE = 'transformers.AutoModel.from_pretrained("{folder}", trust_remote_code=True)'
Shapes = Mapping[str, tuple[int, ...]]


def stock_origin(origin: Origin, edits: Sequence[Edit]) -> Origin | None:
    """Return the origin with which the library itself builds a model of the edited shapes.

    Args:
        origin: how the uncut model is built.
        edits: the edits, by paths from the root of the whole model; none for an uncut model.

    Returns:
        The origin with the library's own arguments, or None if no config of a library can express the shapes.
    """
    backend, cuts = backend_of(origin.library), _cuts(edits)
    if backend is None or not backend.LOADS or cuts is None:
        return None
    whole = all(isinstance(edit, KeepUnits) and edit.width == edit.site.d_hidden for edit in edits)
    if not edits or (whole and not origin.earlier):
        return origin
    wanted = build_empty(origin)
    reshape_(wanted, edits)
    drops = [edit for edit in edits if isinstance(edit, DropBlocks)]
    shapes, settings = _shapes(wanted), settings_of(wanted, drops)
    for candidate in _candidates(backend, origin, cuts, drops):
        try:
            built = build_empty(replace(candidate, earlier=()))
        except Exception:  # the architecture has no such argument, or refuses this value, each in its own way
            continue
        if _shapes(built) == shapes and settings_of(built, drops) == settings:
            return replace(candidate, earlier=())
    return None


def _candidates(
    backend: ModelBackend, origin: Origin, cuts: Sequence[KeepUnits], drops: Sequence[DropBlocks]
) -> Iterator[Origin]:
    """Yield origins that may build the edited model: with fewer blocks, and then with other widths."""
    origins = [origin]
    for drop in drops:
        origins = [shorter for each in origins for shorter in backend.shortened(each, drop.run)]
    for each in origins:
        if drops and all(edit.width == edit.site.d_hidden for edit in cuts):
            yield each
        else:
            yield from backend.resized(each, cuts)


def nearest_stock_width(origin: Origin, sites: Sequence[MlpSite], width: int, *, at_most: bool = False) -> int | None:
    """Find the nearest width that the library's config can give the first MLP, with the others in proportion.

    Args:
        origin: how the uncut model is built.
        sites: every MLP that is cut.
        width: wanted number of units of the first site.
        at_most: look at narrower ones alone.

    Returns:
        A width in 1..d_hidden, or None if no near one is stock; the full width only if it was asked for.
    """
    first = sites[0]
    steps = {round(width / step) * step + offset for step in (8, 16) for offset in (-step, 0, step)}
    multiples = {ratio * first.d_model for ratio in range(1, 9)}
    gated = {-(-int(ratio * first.d_model * 2 / 3) // 8) * 8 for ratio in range(1, 9)}  # transformers' SwiGLU rounding
    near = {width} | steps | multiples | gated
    allowed = [w for w in near if (1 <= w < first.d_hidden or w == width) and not (at_most and w > width)]
    for candidate in sorted(allowed, key=lambda w: (abs(w - width), -w)):
        edits = [KeepUnits.first(*pair) for pair in zip(sites, in_proportion(candidate, sites), strict=True)]
        if stock_origin(origin, edits) is not None:
            return candidate
    return None


def in_proportion(width: int, sites: Sequence[MlpSite]) -> list[int]:
    """Return the width of every MLP if the first has this one, in proportion to the model widths."""
    first = sites[0]
    return [max(1, min(site.d_hidden, round(width * site.d_model / first.d_model))) for site in sites]


def why_not_stock(origin: Origin, plan_edits: Sequence[Edit]) -> str:
    """Explain to the user in one line why the library can't load the result, and which near width it could."""
    if origin.library is None:
        return "no library can build this model, so the result loads with vitrim.load(path, model=...)."
    cuts = _cuts(plan_edits)
    if cuts is None:
        others = {edit.MAKES for edit in plan_edits if not isinstance(edit, KeepUnits | DropBlocks)}
        return (
            f"{origin.library} has no config for {', '.join(sorted(others))}; the result loads with vitrim.load(path)."
        )
    if drops := [edit for edit in plan_edits if isinstance(edit, DropBlocks)]:
        return f"{origin.library} has no config for {drops[0].describe()}; the result loads with vitrim.load(path)."
    if not cuts:  # only a library that reads no folders has no place for an uncut model
        return f"{origin.library} reads no folders; the result loads with vitrim.load(path)."
    edit, cut = cuts[0], {edit.site.path for edit in cuts}
    others = [site for site in find_mlps(build_empty(origin), scope=origin.encoder) if site.path not in cut]
    if others:  # no width of the others is to be changed, so there is none to look for
        return f"{origin.library} has no config that cuts {len(cut)} of {len(cut) + len(others)} MLPs."
    nearest = nearest_stock_width(origin, [edit.site for edit in cuts], edit.width)
    hint = "" if nearest in (None, edit.width) else f"; the nearest that it could is {nearest}"
    return f"{origin.library} has no config for these widths ({edit.width} of {edit.site.d_hidden}){hint}."


def loads_with(origin: Origin, folder: object, *, stock: bool, remote_code: bool = False) -> str:
    """Return the line of Python that loads an output folder; `remote_code` says that it has a modeling file."""
    if remote_code:
        return REMOTE_CODE.format(folder=folder)
    backend = backend_of(origin.library) if stock else None
    if backend is None:
        return f'vitrim.load("{folder}")' if origin.library else f'vitrim.load("{folder}", model=...)'
    return backend.LOADS.format(folder=folder, architecture=origin.architecture)


def _cuts(edits: Sequence[Edit]) -> list[KeepUnits] | None:
    """Return the last cut of each MLP that is left, or None if some edit cuts neither hidden units nor blocks."""
    cuts: dict[str, KeepUnits] = {}
    for edit in edits:
        if isinstance(edit, DropBlocks):
            moved = {edit.new_path(path): cut for path, cut in cuts.items()}
            cuts = {path: cut for path, cut in moved.items() if path is not None}
        elif isinstance(edit, KeepUnits):
            cuts[edit.site.path] = edit
        else:
            return None
    return list(cuts.values())


def settings_of(model: nn.Module, drops: Sequence[DropBlocks]) -> dict[str, Any]:
    """Return the plain values that set up the modules of the lists that lost blocks, such as the shift of a window.

    A block at another number is not always the same block: of Swin's every second one is shifted. Rates that only
    training looks at are left out.
    """
    paths = tuple(f"{drop.run.path}." for drop in drops)
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if drops and name.startswith(paths)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple) and key != "training" and "drop" not in key
    }


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
