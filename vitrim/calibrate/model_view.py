"""A live model and its images as a method for whole models sees them: the implementation of `types.ModelView`.

It only returns plain tensors; the caller that carries out the method's edits changes the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from vitrim.calibrate.gradients import graph_from
from vitrim.calibrate.runs import find_runs, num_held_out, relative_error, run_sums, tokens_of, with_edits
from vitrim.calibrate.sums import HiddenAdder, LayerAdder, check_finite, passes
from vitrim.calibrate.token_blocks import find_token_blocks, split_block
from vitrim.errors import RecipeError, SiteNotFoundError
from vitrim.inputs import real_tokens, run_on
from vitrim.layers.kept_tokens import KeptTokens
from vitrim.methods.registry import BetweenSteps, FactorTraining
from vitrim.models.attention import find_attentions
from vitrim.models.features import device_of, evaluating, features, first_tensor
from vitrim.models.layers import find_layers
from vitrim.progress import Progress
from vitrim.surgery import Edit, KeepHeadDims, apply_, channels_last, mlp_output, read_weights, submodule, turned
from vitrim.tokens import Features
from vitrim.types import AttentionSite, BlockRun, LayerSite, LayerSums, MlpSite, MlpWeights, RunInputs, Stats, T


class LiveModelView:
    """A live model with its calibration images; `ModelView` documents each method."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[MlpSite],
        widths: Mapping[str, int],
        batches: Sequence[Tensor] | None,
        *,
        seed: int,
        share: float | None = None,
        repaired: bool = False,
        bar: Progress | None = None,
        trainer: Callable[..., Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model, self.sites, self.widths, self.batches = model, sites, widths, batches
        self.share, self.repaired, self.trainer = share, repaired, trainer
        self.generator: Generator = torch.Generator().manual_seed(seed)
        self.notes: list[str] = []
        self.split: dict[str, KeptTokens] = {}
        self.bar = bar or Progress("", 0)

    @property
    def keep_ratio(self) -> float:
        """The share that was asked for; else that of all hidden units which stays by the budget."""
        if self.share is not None:
            return self.share
        return sum(self.widths.values()) / max(1, sum(site.d_hidden for site in self.sites))

    @property
    def has_images(self) -> bool:
        """Whether there are calibration images."""
        return self.batches is not None

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer by its full name, detached."""
        path, _, own = name.rpartition(".")
        found = getattr(submodule(self.model, path), own, None)
        if not isinstance(found, Tensor):
            raise SiteNotFoundError(f"{name}: no such tensor in {type(self.model).__name__}.")
        return found.detach()

    def weights(self, site: MlpSite) -> MlpWeights:
        """Return an MLP's weights in the layout that all kinds share."""
        return read_weights(self.model, site)

    def layers(self, *, factors: bool = False) -> tuple[LayerSite, ...]:
        """Return every linear and convolution layer; with `factors` also low-rank factors that replaced one."""
        return find_layers(self.model, factors=factors)

    def blocks(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of each block's tensors."""
        paths = dict.fromkeys(site.block for site in self.sites)
        return {
            path: {n: tuple(t.shape) for n, t in submodule(self.model, path).state_dict().items()} for path in paths
        }

    def attentions(self, *, padded: bool = False, own: bool = False) -> list[AttentionSite]:
        """Return every self-attention that ours reproduces on real tokens; note the others.

        With `padded` also those whose own code has to stay, if what a head puts out is linear in its values; with `own`
        also ours, of an earlier step.

        Raises:
            RecipeError: there are no images.
        """
        found: dict[str, AttentionSite | None] = {}
        candidates = list(find_attentions(self.model, own=own))
        handles = [
            submodule(self.model, site.path).register_forward_hook(_confirm(site, found, padded), with_kwargs=True)
            for site in candidates
        ]
        try:
            with evaluating(self.model):
                run_on(self.model, self._batches()[0][:2].to(device_of(self.model)))
        finally:
            for handle in handles:
                handle.remove()
        for site in candidates:
            known = found.get(site.path)
            if known is None:
                self.note(f"{site.path}: no plain attention (positions, norms or masks inside), so it was left alone.")
            elif known.mixes == "values":
                self.note(
                    f"{site.path}: positions or norms stand between queries and keys, so these stay whole; its values "
                    "are cut."
                )
        return [site for site in found.values() if site is not None]

    def token_blocks(self) -> tuple[Sequence[AttentionSite], int, int, bool]:
        """Return each block's attention, how many tokens precede patches, of how many, whether these alone count.

        These alone count if the patches behind the last block change neither pooled features nor scores.

        Raises:
            RecipeError: there are no images.
            SiteNotFoundError: tokens can't leave the model's blocks, or none stands in front of the patches.
        """
        return find_token_blocks(self.model, self.sites, self.attentions(own=True), self._batches()[0][:2])

    def kept(self, site: AttentionSite, tokens_BND: Tensor, index: Sequence[int]) -> Tensor:
        """Return the tokens at an index as the block around an attention makes them of those that it is given."""
        return self._split(site).run(tokens_BND, torch.tensor(index, device=tokens_BND.device))

    def attention_maps(self, site: AttentionSite, tokens_BND: Tensor) -> Iterator[Tensor]:
        """Yield the attention (B, N, N) of each head, from the tokens that its block is given."""
        return self._split(site).attention_maps(tokens_BND)

    def _split(self, site: AttentionSite) -> KeptTokens:
        """Return a copy of the block around an attention, made so that tokens can leave it; one is kept of each."""
        if site.block not in self.split:
            self.split[site.block] = split_block(self.model, site)
        return self.split[site.block]

    def note(self, text: str) -> None:
        """Record a note for the user."""
        self.notes.append(text)

    def track(self, items: Sequence[T], words: str) -> Iterator[T]:
        """Yield the items one by one and show the progress."""
        return self.bar.track(items, words)

    def observe(self, paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Run the calibration images through the whole model, and watch the given modules.

        Raises:
            RecipeError: there are no images.
        """
        batches = self._batches()
        now: list[Tensor] = []

        def see_real(path: str, *seen: Tensor) -> None:
            see(path, *(real_tokens(tokens, now[-1]) for tokens in seen))

        handles = [submodule(self.model, path).register_forward_hook(_watch(path, see_real)) for path in paths]
        try:
            with evaluating(self.model):
                for batch in self.track(batches, "calibration images"):
                    now.append(batch)
                    run_on(self.model, batch.to(device_of(self.model)))
        finally:
            for handle in handles:
                handle.remove()

    def stats(self, site: MlpSite) -> Stats:
        """Return the sums of an MLP's hidden units and of its outputs."""
        adder = HiddenAdder()
        self.observe([site.output], lambda path, hidden, output: adder.add(hidden))
        return adder.stats(self.weights(site))

    def layer_sums(self, layers: Sequence[LayerSite]) -> Iterator[tuple[Sequence[LayerSite], Mapping[str, LayerSums]]]:
        """Yield groups of layers with their sums by path, with one pass over the images per group."""
        for group in passes(layers, lambda layer: LayerAdder(layer=layer).num_bytes):
            adders = {layer.path: LayerAdder(layer=layer) for layer in group}
            self.observe(list(adders), lambda path, inputs, outputs, adders=adders: adders[path].add(inputs, outputs))
            found = {path: adder.finished() for path, adder in adders.items()}
            yield group, {path: sums for path, sums in found.items() if sums is not None}

    def runs(self, length: int) -> Sequence[BlockRun]:
        """Return every run of this many blocks that can be taken out.

        Raises:
            BudgetError: there is none.
        """
        return find_runs(self.model, self.sites, length, self._batches()[0][:2], self.note)

    def run_sums(self, runs: Sequence[BlockRun], *, of: RunInputs) -> Iterator[tuple[BlockRun, Stats]]:
        """Yield each run with the sums at the layer in front of it, over all images that are not held out."""
        batches = self._batches()
        yield from run_sums(self.model, runs, batches[: len(batches) - num_held_out(batches)], of)

    def tried(self, edits: Iterable[T]) -> Iterator[tuple[T, float]]:
        """Yield each edit with the error of the features it causes on held-out images; one batch judges itself."""
        batches = self._batches()[-max(1, num_held_out(self._batches())) :]
        wanted = tokens_of(self.model, batches)
        for edit in edits:
            yield edit, relative_error(tokens_of(with_edits(self.model, [cast(Edit, edit)]), batches), wanted)

    def pooled(self, silenced: Mapping[str, Tensor] | None = None, *, num_images: int | None = None) -> list[Tensor]:
        """Return the pooled features of each batch, with some inputs of some modules set to zero.

        Raises:
            RecipeError: there are no images.
        """
        batches = self._batches()
        handles = [
            submodule(self.model, path).register_forward_pre_hook(_silence(positions))
            for path, positions in (silenced or {}).items()
        ]
        found: list[Tensor] = []
        try:
            with evaluating(self.model):
                for batch in self.track(batches, "calibration images"):
                    if num_images is None or sum(map(len, found)) < num_images:
                        found.append(features(self.model, batch.to(device_of(self.model))).pooled_BD)
                        check_finite(type(self.model).__name__, "a pooled feature", found[-1])
        finally:
            for handle in handles:
                handle.remove()
        return found

    def differentiate(
        self, loss: Callable[[Features], Tensor], paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        """Compute gradients of a loss of the features for the inputs of some modules, batch by batch.

        Only one batch's graph is held at a time; it begins at the first of the modules and contains no parameters.

        Raises:
            RecipeError: there are no images.
        """
        batches = self._batches()
        with graph_from(self.model, paths, "inputs") as seen:
            for batch in self.track(batches, "calibration images"):
                total = loss(features(self.model, batch.to(device_of(self.model))))
                inputs = [hidden for _, hidden in seen]
                gradients = torch.autograd.grad(total, inputs, materialize_grads=True)
                for (path, hidden), gradient in zip(seen, gradients, strict=True):
                    check_finite(path, "an input or its gradient", hidden, gradient)
                    layer = submodule(self.model, path)
                    see(path, channels_last(layer, hidden.detach()), channels_last(layer, gradient))
                seen.clear()

    def run(self, site: MlpSite, tokens_ND: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the output of an MLP run by itself, in eval mode; one that needs its block gives something else."""
        mlp, trains = submodule(self.model, site.path), torch.is_grad_enabled()
        local = {f"mlp.{name.removeprefix(f'{site.path}.')}": tensor for name, tensor in tensors.items()}
        with evaluating(mlp), torch.inference_mode(False), torch.set_grad_enabled(trains):
            return functional_call(_OneMlp(mlp, site.within(site.path)), local, (tokens_ND,), tie_weights=False)

    def train_factors(self, training: FactorTraining, between: BetweenSteps) -> Mapping[str, Tensor]:
        """Return weights with LoRA factors trained on images, by full name, by means of whoever made this view."""
        assert self.trainer is not None
        return self.trainer(self.model, training=training, between=between, bar=self.bar)

    def _batches(self) -> Sequence[Tensor]:
        if self.batches is None:
            raise RecipeError("method: needs calibration images; pass data.")
        return self.batches


class _OneMlp(nn.Module):
    """An MLP as a module whose output is that of its output projection."""

    def __init__(self, mlp: nn.Module, site: MlpSite) -> None:
        super().__init__()
        self.mlp, self.site = mlp, site

    def forward(self, tokens_ND: Tensor) -> Tensor:
        """Return the same as `mlp_output`."""
        return mlp_output(self.mlp, self.site, tokens_ND)


def _confirm(site: AttentionSite, found: dict[str, AttentionSite | None], padded: bool) -> Callable[..., None]:
    """Return a forward hook that runs stand-ins on a module's inputs and weights, and records which one agrees."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        exact = replace(site, as_tuple=isinstance(output, tuple), scale=float(getattr(module, "scale", site.scale)))
        every = (tuple(range(site.head_dim)),) * site.num_heads
        local = exact.within(site.path).below("0")
        trials: list[tuple[AttentionSite, Edit]] = [(exact, KeepHeadDims(site=local, keep_qk=every, keep_v=every))]
        if padded:
            kinds = [replace(exact, mixes="all"), replace(exact, mixes="values")]
            trials += [(kind, turned(module, kind).within(site.path).below("0")) for kind in kinds]
        handles, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
        try:
            agree = (kind for kind, edit in trials if _agrees(module, edit, args, kwargs, first_tensor(output)))
            found[site.path] = next(agree, None)
        finally:
            module._forward_hooks = handles

    return hook


def _agrees(module: nn.Module, edit: Edit, args: Any, kwargs: Any, expected: Tensor) -> bool:
    """Whether a copy of a module, which an edit knows as "0", puts out the same after the edit."""
    holder = nn.Sequential()
    try:
        holder.append(copy.deepcopy(module))
        apply_(holder, [edit])
        mine = first_tensor(holder[0](*args, **kwargs))
        return torch.allclose(mine, expected, atol=1e-4 * float(mine.abs().max()), rtol=1e-4)
    except Exception:  # a foreign module may be called with arguments that ours can't take
        return False


def _watch(path: str, see: Callable[[str, Tensor, Tensor], None]) -> Callable[..., None]:
    """Return a forward hook that passes on a module's first input and output, channels last, once they are finite."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        inputs, outputs = channels_last(module, args[0]), channels_last(module, first_tensor(output))
        check_finite(path, "an input", inputs)
        check_finite(path, "an output", outputs)
        see(path, inputs, outputs)

    return hook


def _silence(positions: Tensor) -> Callable[..., tuple[Any, ...]]:
    """Return a forward hook that zeroes channels of a module's first input."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        inputs = args[0].clone()
        channels_last(module, inputs).index_fill_(-1, positions.to(inputs.device), 0)
        return inputs, *args[1:]

    return hook
