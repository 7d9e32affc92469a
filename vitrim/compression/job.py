"""A job, opened and checked: every error in a request is raised here, before anything is cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate import LiveModelView
from vitrim.clip.embedding_space import embedding_space_of
from vitrim.compression.budget import solve_widths
from vitrim.config.published import family_of
from vitrim.config.recipe import Recipe
from vitrim.data import ImageSet, ImageStream, Split
from vitrim.data.images import check_workers
from vitrim.data.inputs import can_run, check_repeatable, open_inputs, random_inputs
from vitrim.data.match import match_labels
from vitrim.data.poses import poses_of
from vitrim.errors import RecipeError
from vitrim.inputs import Inputs
from vitrim.methods import Method, SiteMethod, find_method
from vitrim.models.features import num_classes
from vitrim.models.live import as_it_is
from vitrim.models.origin import Origin
from vitrim.models.remote_code import check_remote_code
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.output.load import open_model
from vitrim.recover.labels import check_label_options
from vitrim.recover.losses import EmbeddingSpace
from vitrim.recover.sampler import check_stream
from vitrim.recover.trackers import check_trackers
from vitrim.surgery import Edit, KeepUnits, ToRecursive
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model to cut, and everything needed to cut it.

    Attributes:
        whole: the original model, never changed.
        origin: how the original was built, with the path of its encoder.
        scope: path of the part to cut, from the root of the whole model.
        recipe: what the user asked for.
        images: images for selection, repair and recovery; None if there are none.
        space: the embedding space in which pooled vectors are compared, for the image tower of a pair.
        notes: what the user should know about how the request was read.
    """

    whole: nn.Module
    origin: Origin
    scope: str
    recipe: Recipe
    images: ImageSet | ImageStream | None
    space: EmbeddingSpace | None
    notes: tuple[str, ...] = ()

    @property
    def encoder(self) -> nn.Module:
        """The part of the original that takes the inputs."""
        return self.whole.get_submodule(self.origin.encoder)

    @property
    def scope_in_encoder(self) -> str:
        """Path of the part to cut, from the encoder."""
        return self.scope.removeprefix(self.origin.encoder).removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Both encoders on the device, in float32, and the data to compare them on.

    Attributes:
        teacher: the original, frozen.
        student: a copy, which the phases change.
        sites: MLPs to cut, by paths from the encoder.
        split: images for calibration, training and evaluation; None if there are none.
    """

    teacher: nn.Module
    student: nn.Module
    sites: Sequence[MlpSite]
    split: Split | None

    @property
    def batches(self) -> Sequence[Tensor] | None:
        """Calibration images, None if there are none."""
        return None if self.split is None else self.split.calibration

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the images."""
        return () if self.split is None else self.split.notes

    @property
    def counts(self) -> Mapping[str, Any]:
        """Number of images for each purpose."""
        return {} if self.split is None else self.split.counts


def open_job(model: nn.Module | str, recipe: Recipe, data: Any, *, out: Path | None) -> Job:
    """Open a model and its images, and check that they fit the recipe.

    Args:
        model: a module, a name or a folder.
        recipe: the user's recipe.
        data: images; None for none.
        out: folder that will be written, if any; some trackers need one.

    Raises:
        VitrimError: the model or the images can't be opened, or something does not fit.
    """
    check_workers(max((part.num_workers for part in recipe.training), default=0))
    whole, origin = open_model(model, recipe.reading())
    if isinstance(model, nn.Module):  # its owner may have changed it since its library built it
        origin = as_it_is(whole, origin)
    if recipe.remote_code:
        check_remote_code(origin, _kinds_of_edit(recipe))
    encoder, scope = resolve_scope(whole, recipe.scope, origin.encoder)
    if encoder != origin.encoder:  # the known preprocessing belongs to another part
        origin = replace(origin, encoder=encoder, preprocessing={})
    recipe, note = _with_published(recipe, origin)
    space = None if recipe.recover is None else embedding_space_of(whole, origin, recipe.recover)
    noise = random_inputs(origin, 1 if data is None else 2)  # one alone says nothing about batches
    if data is None and isinstance(noise, Inputs) and not can_run(whole.get_submodule(encoder), noise):
        origin, noise = replace(origin, preprocessing={}), None  # cut by its weights alone, it need not
    check_repeatable(whole.get_submodule(encoder), origin, noise)  # before the first image is read
    within = scope.removeprefix(encoder).removeprefix(".")
    _check_training(recipe, whole.get_submodule(encoder), within)
    if data is not None:
        _check_method(recipe, whole.get_submodule(encoder), within, noise)
    images = None if data is None else open_inputs(data, origin)
    _check_labels(recipe, images, whole.get_submodule(encoder))
    if images is None and recipe.training:
        raise RecipeError("recover, at_once, blockwise, exits: distillation needs images; pass data.")
    if recipe.recover is not None:
        check_trackers(recipe.recover.report_to, folder=out)
        if isinstance(images, ImageStream):
            check_stream(images, recipe.recover)
    notes = (*origin.notes, *(() if note is None else (note,)))
    return Job(whole=whole, origin=origin, scope=scope, recipe=recipe, images=images, space=space, notes=notes)


def _kinds_of_edit(recipe: Recipe) -> list[type[Edit]]:
    """Return the kinds of edit that the steps of a recipe may make, given their options."""
    methods = [step.make_method() for step in recipe.steps]
    mlps_alone = [isinstance(method, SiteMethod) and method.cuts() == "mlp" for method in methods]
    kinds = [(KeepUnits,) if alone else method.edits for alone, method in zip(mlps_alone, methods, strict=True)]
    return [kind for each in kinds for kind in each]


def _check_labels(recipe: Recipe, images: ImageSet | ImageStream | None, encoder: nn.Module) -> None:
    """Check that there are labels for the head, if a method or training reads them.

    Raises:
        DataError: the model is one of poses, and the images have joints that can't be.
        RecipeError: there are none, or training with them goes with no option that was given.
    """
    if hasattr(encoder, "joint_tokens") and isinstance(images, ImageSet):
        _ = images.joints  # read here, so that damaged ones are refused before any work
    name = next((step.method for step in recipe.steps if step.make_method().reads_labels()), None)
    key = "options" if name is not None else "recover"
    if recipe.recover is not None and recipe.recover.loss == "labels":
        check_label_options(recipe.recover)
        name = name or "recover"
    if name is None or images is None:
        return
    if isinstance(images, ImageStream):
        raise RecipeError(f"{key}.loss=labels: {name} reads no labels of a stream; use features.")
    if name == "recover" and poses_of(encoder, images, needed=True) is not None:
        return
    if not (fits := match_labels(images, encoder))[1]:
        why = "the model has no head" if fits[2] is None else fits[2].removesuffix(", so top-1 is not measured.")
        raise RecipeError(f"{key}.loss=labels: {why}; pass labels of the model's classes, or use features.")


def _check_training(recipe: Recipe, encoder: nn.Module, scope: str) -> None:
    """Check that there will be exits, if they are to be trained, and a head, if class scores are to be compared.

    Raises:
        RecipeError: there are none, or there is none.
    """
    looped = _loops_blocks(recipe, encoder, scope)
    if recipe.exits is not None and not looped:
        raise RecipeError(
            "exits: are at the ends of loops, and no step loops blocks; use recursive with fewer blocks, or drop exits."
        )
    for name, options in (("recover", recipe.recover), ("exits", recipe.exits)):
        if options is not None and options.features_at == "logits" and not num_classes(encoder):
            raise RecipeError(f"{name}.features_at: logits needs a model with a class head; use final.")


def _check_method(recipe: Recipe, encoder: nn.Module, scope: str, noise: Tensor | None) -> None:
    """Check that there are budgets; let the first step's method see the model, later ones see what it has left of it.

    Raises:
        VitrimError: the method can't cut this model as it is asked to.
    """
    for step in recipe.steps:
        if step.has_default_budget and "params_ratio" in find_method(step.method).senseless:
            raise RecipeError(
                "keep_ratio or macs_ratio: the default budget, half of the parameters, says nothing about what "
                f"{step.method} cuts; give one of the two."
            )
    first, method = recipe.steps[0], recipe.steps[0].make_method()
    if type(method).check is Method.check:
        return
    if any(tensor.dtype != torch.float32 for tensor in encoder.parameters()):
        encoder = copy.deepcopy(encoder).float()  # as it will be cut
    sites = find_mlps(encoder, scope=scope)
    batches, widths = None if noise is None else [noise], {site.path: site.d_hidden for site in sites}
    method.check(LiveModelView(encoder, sites, widths, batches, seed=recipe.seed, share=first.keep_ratio))
    if first.budget is not None and not (width := recipe.width()).is_of_the_model:
        solve_widths(width, sites, encoder, None)


def _loops_blocks(recipe: Recipe, encoder: nn.Module, scope: str) -> bool:
    """Return whether a step will loop blocks of an encoder, as far as is known before it is cut.

    Raises:
        VitrimError: the first step can't loop these blocks as it is asked to.
    """
    first, *later = recipe.steps
    if any(ToRecursive in find_method(step.method).edits for step in later):
        return True
    if ToRecursive not in find_method(first.method).edits:
        return False
    share = first.keep_ratio or first.params_ratio
    view = LiveModelView(encoder, find_mlps(encoder, scope=scope), {}, None, seed=recipe.seed, share=share)
    return first.make_method().loops_blocks(view)


def _with_published(recipe: Recipe, origin: Origin) -> tuple[Recipe, str | None]:
    """Return the recipe with the published schedule of the model's family filled in, and a note on whose it is."""
    options = recipe.recover
    if options is None or options.schedule is None:
        return recipe, None
    family = family_of(origin.architecture, origin.library)
    note = f"recover.schedule: what was not given is as the DGMR paper published it for {family}."
    return recipe.model_copy(update={"recover": options.as_published(family)}), note
