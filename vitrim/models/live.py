"""A live model beside what its library builds from the arguments that it recorded: its owner may have changed it since.

A new head, a smaller depth or narrower MLPs are recorded in the origin, so that the library's own format still holds.
Whatever else differs makes the model one that only its owner can build. Both are said before anything is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError
from vitrim.inputs import run_on
from vitrim.models.features import evaluating, first_tensor
from vitrim.models.load import backend_of, build_empty
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.surgery import KeepUnits

log = logging.getLogger("vitrim")


def as_it_is(model: nn.Module, origin: Origin) -> Origin:
    """Return an origin that builds a live model as it is now, with a note on what had to be changed for that.

    Args:
        model: the live model; it is run on noise, and not changed.
        origin: how its library built it once.

    Returns:
        The origin, without a library if none can build the model. The note is logged at once.
    """
    backend = backend_of(origin.library)
    if backend is None:
        return origin
    rebuilt = _built(origin)
    reason = "they are not enough to build it" if rebuilt is None else unlike(model, rebuilt, origin)
    if reason is None:
        return origin
    if rebuilt is not None:
        found, said = _recorded(model, rebuilt, backend.adjusted(origin, model, rebuilt))
        again = _built(found) if said else None
        if again is not None and unlike(model, again, found) is None:
            return _noted(
                found, f"the model is not as {origin.library} built it: {', '.join(said)}; so it is recorded."
            )
    note = (
        f"the model is another than what {origin.library} builds from its arguments ({reason}), so the result will be "
        "in vitrim's own format."
    )
    return _noted(replace(origin, library=None), note)


def with_its_classes(model: nn.Module, origin: Origin) -> Origin:
    """Return the origin of a live model with the classes of the head that it has now, whatever else differs.

    Args:
        model: the live model; it is not changed.
        origin: how its library built it once.

    Returns:
        The origin, without a library if that can't build the model at all.
    """
    backend, rebuilt = backend_of(origin.library), _built(origin)
    if backend is None or rebuilt is None:
        return replace(origin, library=None)
    return backend.adjusted(origin, model, rebuilt)[0]


def _noted(origin: Origin, note: str) -> Origin:
    log.warning("%s: %s", origin.name, note)
    return replace(origin, notes=(*origin.notes, note))


def unlike(model: nn.Module, rebuilt: nn.Module, origin: Origin) -> str | None:
    """Return in a few words how a model differs from one that was built again on the meta device; None if it does not.

    Names and shapes of all tensors are compared, modules that stand in several places, and the outputs for noise.
    """
    mine, theirs = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (model, rebuilt))
    wrong = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    if wrong:
        shown = [f"{name} is {mine.get(name, 'missing')} and not {theirs.get(name, 'there')}" for name in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return "; ".join(shown) + more
    shared, known = _shared(model), _shared(rebuilt)
    pair = next((paths for paths in shared if paths not in known), None)
    if pair is not None:
        return f"{' and '.join(pair[:3])} are one module"
    return None if _same_outputs(model, rebuilt, origin) else "the same weights give other outputs there"


def _built(origin: Origin) -> nn.Module | None:
    """Build an origin on the meta device; None if it can't be."""
    try:
        return build_empty(origin)
    except VitrimError:
        return None


def _recorded(model: nn.Module, rebuilt: nn.Module, adjusted: tuple[Origin, list[str]]) -> tuple[Origin, list[str]]:
    """Add to an adjusted origin the widths of MLPs that are narrower than the library builds them."""
    origin, said = adjusted
    again = rebuilt if not said else _built(origin)
    if again is None:
        return origin, said
    try:
        mine = {site.path: site for site in find_mlps(model, scope=origin.encoder)}
        theirs = find_mlps(again, scope=origin.encoder)
    except VitrimError:
        return origin, said
    cuts: Sequence[KeepUnits] = [
        KeepUnits.first(site, mine[site.path].d_hidden)
        for site in theirs
        if site.path in mine and mine[site.path].d_hidden < site.d_hidden
    ]
    if not cuts:
        return origin, said
    return origin.after(cuts), [*said, f"{len(cuts)} MLPs are narrower"]


def _shared(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the paths of every module that stands in several places and has parameters."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters()):
            places.setdefault(id(module), []).append(path)
    return [tuple(paths) for paths in places.values() if len(paths) > 1]


def _same_outputs(model: nn.Module, rebuilt: nn.Module, origin: Origin) -> bool:
    """Run both on noise with the live model's own tensors; True also where the size of an input is not known."""
    parameter, size = next(model.parameters()), origin.preprocessing.get("input_size")
    if size is None or parameter.is_meta:
        return True
    rebuilt.load_state_dict(model.state_dict(), assign=True)  # the same tensors: no memory is taken
    rebuilt.to(parameter.device)
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
    outputs = [_output(each.get_submodule(origin.encoder), noise) for each in (model, rebuilt)]
    if outputs[0] is None or outputs[1] is None:  # an input that it does not take is reported by whoever feeds it
        return outputs[0] is outputs[1]
    error, scale = float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].abs().max())
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 0.05
    return not error > tolerance * scale  # a model that is not finite is none of this check's business


def _output(model: nn.Module, inputs: Tensor) -> Tensor | None:
    """Return the output of a model as one tensor, with the same random numbers each time; None if it does not run."""
    with torch.random.fork_rng(devices=[]), evaluating(model):
        torch.manual_seed(0)
        try:
            output = run_on(model, inputs)
        except Exception:  # foreign code says in its own ways what it does not take
            return None
    return first_tensor(output).float()
