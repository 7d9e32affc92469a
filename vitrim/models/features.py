"""Features of a vision encoder: CLS or pooled vector plus patch tokens, before or after the final norm.

There is one small adapter for each way in which libraries return features: timm's `forward_features`, transformers'
model outputs, open_clip's towers, and any module that returns a tensor. No foreign `forward` is copied. For a text
encoder the first token is the pooled vector and the others are the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.inputs import Inputs, in_one_row, run_on, tokens_by_image
from vitrim.layers.kept_tokens import SplitBlock
from vitrim.models.prefix import Prefix, num_prefix_tokens
from vitrim.models.reads import Reads, feature_maps, reads
from vitrim.tokens import Features
from vitrim.types import FeaturesAt

FINAL_NORMS = ("norm", "fc_norm", "ln_post", "layernorm", "encoder.layernorm", "encoder.ln", "post_layernorm")


def features(model: nn.Module, inputs: Tensor, *, at: FeaturesAt = "final") -> Features:
    """Run an encoder and return its features.

    Args:
        model: an encoder of timm, transformers, open_clip or torchvision, or a module that returns a (B, D) or
            (B, N, D) tensor.
        inputs: preprocessed images (B, C, H, W) or named tensors, or token ids (B, N), on the model's device.
        at: `final` reads the tokens after the final norm, `pre_norm` before it; `logits` reads class scores, less their
            mean over the classes, which no probability depends on, as the pooled vector.

    Returns:
        Pooled vector (B, D), the CLS token if there is one, and patch tokens (B, N, D) or None. Where images
        have different numbers of them, all stand in one row (1, N, D).

    Raises:
        ModelError: the output holds no tensor of features, or the model has no final norm or head to read at.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
        >>> found = features(model, torch.zeros(1, 3, 32, 32))
        >>> found.pooled_BD.shape, found.patches_BND.shape
        (torch.Size([1, 192]), torch.Size([1, 4, 192]))
    """
    found, kept = _read(model, inputs, at), kept_patches(model)
    # Tokens that stand for several patches are at no place in the image.
    return replace(found, patches_BND=None if kept == () else found.patches_BND, token_positions=kept)


def kept_positions(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return by path of each block that keeps some of its tokens where these stood in the whole sequence, in order."""
    return {path: module.positions for path, module in model.named_modules() if isinstance(module, SplitBlock)}


def kept_patches(model: nn.Module) -> tuple[int, ...] | None:
    """Return which patches a model's features have, by their number in the image; None for all."""
    kept = list(kept_positions(model).values())
    if not kept:
        return None
    first = num_prefix_tokens(model)
    return tuple(position - first for position in kept[-1] if position >= first)


def same_patches(found: Features, like: Features) -> Features:
    """Return features with those patches alone that others have, so that like is compared with like.

    Raises:
        ModelError: the others have patches that these do not have.
    """
    wanted, have = like.token_positions, found.token_positions
    if wanted == have or wanted is None or found.patches_BND is None:
        return found
    places = {patch: number for number, patch in enumerate(have or range(found.patches_BND.shape[1]))}
    if not set(wanted) <= set(places):
        raise ModelError("one of the models keeps patches that the other one has not; compare both with the original.")
    index = torch.tensor([places[patch] for patch in wanted], dtype=torch.long, device=found.patches_BND.device)
    patches_BND = found.patches_BND.index_select(1, index) if wanted else None
    return replace(found, patches_BND=patches_BND, token_positions=wanted)


def _read(model: nn.Module, inputs: Tensor, at: FeaturesAt) -> Features:
    """Return features after or in front of the final norm."""
    prefix = Prefix(model, at)
    if at == "final" or (at == "pre_norm" and reads(model) is not None):  # hidden states are in front of the norm
        with prefix.watched():
            return _features(model, inputs, prefix)
    if at == "logits":
        scores_BC = logits(model, inputs)
        if scores_BC is None:
            raise ModelError(f"{type(model).__name__}: has no head for class scores; use features_at='final'.")
        return Features(pooled_BD=scores_BC - scores_BC.mean(1, keepdim=True), taken="class scores, less their mean")
    norm = final_norm(model)
    if norm is None:
        raise ModelError(f"{type(model).__name__}: no final norm found; use features_at='final'.")
    caught: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with prefix.watched():
            found = _features(model, inputs, Prefix(model, "final"))
    finally:
        handle.remove()
    if not caught:  # the norm is for the pooled token alone, behind the features: timm's `fc_norm`
        return found
    if caught[-1].ndim == 2 and found.patches_BND is not None:  # CLIP's norm is for the pooled token alone
        _, _, patches = found.taken.partition("; ")
        return replace(found, pooled_BD=caught[-1], taken=f"pooled: input of the final norm; {patches}")
    return _split(prefix, caught[-1], "the final norm's input", inputs)


def final_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm at the end of the encoder, or None if there is none with parameters."""
    for name in [f"{part}{name}" for part in ("", "trunk.") for name in FINAL_NORMS]:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if any(True for _ in module.parameters()):
            return module
    return None


def first_tensor(output: Any) -> Tensor:
    """Return what a module put out, or the first tensor of it: in a tuple, an output class, or one in the other."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def logits(model: nn.Module, inputs: Tensor) -> Tensor | None:
    """Return a classifier's class scores (B, classes), or None for a model without a classifier head."""
    if not num_classes(model):
        return None
    output = run_on(model, inputs)
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def num_classes(model: nn.Module) -> int:
    """Return the number of classes of the model's head, 0 if it has none."""
    classes = getattr(model, "num_classes", None)
    if classes is None:
        head = _class_head(model)
        classes = 0 if head is None else head.out_features
    return int(classes or 0)  # type: ignore[arg-type]


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes of a model's head, as timm and transformers keep them; () if not known."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    said = cfg.get("label_names") if isinstance(cfg, Mapping) else None
    if said is None:
        said = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(said, Mapping):
        said = [said.get(number, said.get(str(number))) for number in range(len(said))]
    if not isinstance(said, list | tuple) or len(said) != num_classes(model):
        return ()
    return tuple(said) if all(isinstance(name, str) for name in said) and are_names(said) else ()


def are_names(labels: Iterable[Any]) -> bool:
    """Return whether labels are more than what transformers fills in where nobody gave names."""
    return any(label != f"LABEL_{number}" for number, label in enumerate(labels))


def _class_head(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer at the end of a transformers or torchvision classifier, or None."""
    for name in ("classifier", "cls_classifier", "heads.head", "head"):  # the second is of DeiT's two
        module = model
        for part in name.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.Linear):
            return module
    return None


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def inputs_for(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs on a model's device, and of its type where they are images: a model may be float16 or bfloat16."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return inputs.to(first.device, first.dtype if inputs.is_floating_point() else None)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Hold models in eval mode without gradients inside a `with` block, and restore every module's mode afterwards."""
    with _modes_kept(*models):
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients inside a `with` block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore every module's mode and parameter's `requires_grad` after a `with` block, and drop all gradients."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with _modes_kept(model):
        try:
            yield
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(flags[name])
                p.grad = None


@contextmanager
def _modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore every module's mode after a `with` block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _features(model: nn.Module, inputs: Tensor, prefix: Prefix) -> Features:
    """Return features after the final norm, in whichever way the model's library returns them."""
    if hasattr(model, "trunk") and hasattr(model, "head"):  # open_clip's wrapper around a timm tower
        trunk: Any = model.trunk
        output = trunk.forward_features(inputs)
        pooled_BD = cast(nn.Module, model.head)(trunk.forward_head(output))
        found = _split(Prefix(trunk, prefix.at), _tokens(trunk, output), "trunk.forward_features", inputs)
        return _with_pooled(found, pooled_BD, "trunk.forward_head, then head")
    if hasattr(model, "output_tokens"):  # open_clip's own tower: the projected pooled vector, and tokens without CLS
        with _held(model, "output_tokens", True):
            pooled_BD, patches_BND = model(inputs)
        taken = "pooled: the tower's output, projected; patches: its tokens before the projection"
        num_prefix = prefix.number(1 + patches_BND.shape[1])
        return Features(pooled_BD=pooled_BD, patches_BND=patches_BND, taken=taken, num_prefix=num_prefix)
    if (said := reads(model)) is not None:
        return _hidden_states(model, said, prefix, inputs)
    output, where = _output(model, inputs)
    if maps := feature_maps(model, output):
        return _several(prefix, {f"feature_maps[{number}]": tokens for number, tokens in enumerate(maps)}, inputs)
    tokens = _tokens(model, output)
    found = _split(prefix, tokens, where, inputs)
    if in_one_row(tokens, inputs):  # and so is what the model calls its pooled output
        further = getattr(output, "deepstack_features", None) or ()  # read inside of Qwen3-VL's language model
        return _with_maps(found, [_split(prefix, each, where, inputs) for each in further], "deepstack_features")
    pooled_BD, name = _own_pooled(model, output, tokens)
    return found if pooled_BD is None else _with_pooled(found, pooled_BD, name)


def _hidden_states(model: nn.Module, said: Reads, prefix: Prefix, inputs: Tensor) -> Features:
    """Return the hidden states of a tower that a projector reads."""
    states = run_on(model, inputs, output_hidden_states=True).hidden_states
    found = _several(prefix, {f"hidden_states[{layer}]": states[layer] for layer in said.layers}, inputs)
    if not said.prefix and found.num_prefix:
        _, _, rest = found.taken.partition("; ")
        pooled = f"mean over {rest.partition('; ')[0].removeprefix('patches: ')}"
        found = replace(_with_pooled(found, cast(Tensor, found.patches_BND).mean(1), pooled), num_prefix=0)
    unread = len(states) - 1 - max(range(len(states))[layer] for layer in said.layers)
    behind = f"; no user reads what the last {unread} of {len(states) - 1} blocks make of it" if unread else ""
    return replace(found, taken=found.taken + behind)


def _several(prefix: Prefix, tokens: Mapping[str, Tensor], inputs: Tensor) -> Features:
    """Return the features of the last of several layers, with the patches of the others as maps."""
    *others, last = (_split(prefix, each, where, inputs) for where, each in tokens.items())
    return _with_maps(last, others, ", ".join(list(tokens)[:-1]))


def _with_maps(found: Features, others: Sequence[Features], names: str) -> Features:
    """Return features with the patches of others as maps, which were read at places of these names."""
    if not others:
        return found
    maps = tuple(each.pooled_BD[:, None] if each.patches_BND is None else each.patches_BND for each in others)
    return replace(found, maps=maps, taken=f"{found.taken}; maps: {names}")


def _with_pooled(found: Features, pooled_BD: Tensor, name: str) -> Features:
    """Return features with another pooled vector, read at a place of this name."""
    _, separator, patches = found.taken.partition("; ")
    return replace(found, pooled_BD=pooled_BD, taken=f"pooled: {name}{separator}{patches}")


def _output(model: nn.Module, inputs: Tensor) -> tuple[Any, str]:
    """Return what a model without its head puts out, and the name of that place."""
    if hasattr(model, "forward_features"):  # timm, and DINOv2's own code
        return cast(Callable[[Tensor], Any], model.forward_features)(inputs), "forward_features"
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:  # transformers: an encoder below a head, or in an encoder
        with _caught(base) as seen:
            output = run_on(model, inputs)
        own = (getattr(output, name, None) for name in ("last_hidden_state", "feature_maps"))
        if all(each is None for each in own) and seen:
            return seen[-1], f"last_hidden_state of {getattr(model, 'base_model_prefix', 'base_model')}"
        return output, "last_hidden_state"
    if _class_head(model) is not None and (norm := final_norm(model)) is not None:  # torchvision
        with _caught(norm) as seen:
            run_on(model, inputs)
        return seen[-1], "the final norm's output"
    output = run_on(model, inputs)
    named = (name for name in ("last_hidden_state", "logits") if isinstance(getattr(output, name, None), Tensor))
    return output, next(named, "the model's output")


def _tokens(model: nn.Module, output: Any) -> Tensor:
    """Return the tokens (B, N, D) in a model's output, or its single vector (B, D)."""
    if isinstance(output, dict) and "x_norm_clstoken" in output:  # DINOv2's own code
        return torch.cat([output["x_norm_clstoken"][:, None], output["x_norm_patchtokens"]], dim=1)
    pooled = getattr(output, "pooler_output", None)
    for name in ("last_hidden_state", "logits"):
        if isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
            break
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(model).__name__}: returned {type(output).__name__}; need a tensor of features.")
    if output.ndim == 4:  # Swin: channels last; convolutional stages: channels first
        width = pooled.shape[-1] if isinstance(pooled, Tensor) else getattr(model, "num_features", None)
        is_last = output.shape[-1] != output.shape[-2] if width is None else output.shape[-1] == width
        output = output.flatten(1, 2) if is_last else output.flatten(2).transpose(1, 2)
    return output


def _split(prefix: Prefix, tokens: Tensor, where: str, inputs: Tensor | Inputs) -> Features:
    """Split tokens, read at a place of this name, into pooled vector and patches, by the number of prefix tokens."""
    if in_one_row(tokens, inputs) or (isinstance(inputs, Inputs) and inputs.real_BN is not None):
        parts = tokens_by_image(tokens, inputs)
        patches = torch.stack(parts) if len({len(part) for part in parts}) == 1 else torch.cat(parts)[None]
        pooled_BD = torch.stack([part.mean(0) for part in parts])
        return Features(pooled_BD=pooled_BD, patches_BND=patches, taken=f"pooled: mean over {where}; patches: {where}")
    if tokens.ndim == 2:
        return Features(pooled_BD=tokens, taken=f"pooled: {where}")
    tokens = tokens.flatten(1, -2)
    num_prefix = prefix.number(tokens.shape[1])
    if 0 < tokens.shape[1] <= num_prefix:  # PiT gives its prefix alone
        return Features(pooled_BD=tokens[:, 0], taken=f"pooled: token 0 of {where}", num_prefix=num_prefix)
    patches = tokens[:, num_prefix:]
    pooled = f"token 0 of {where}" if num_prefix else f"mean over {where}"
    taken = f"pooled: {pooled}; patches: {f'tokens {num_prefix} and on of ' if num_prefix else ''}{where}"
    pooled_BD = tokens[:, 0] if num_prefix else patches.mean(1)
    return Features(pooled_BD=pooled_BD, patches_BND=patches, taken=taken, num_prefix=num_prefix)


def _own_pooled(model: nn.Module, output: Any, tokens: Tensor) -> tuple[Tensor | None, str]:
    """Return the model's own pooled vector, and its name; None if it is no more than the CLS token or a mean of tokens.

    A `pooler` with a dense layer and tanh (BERT's, kept by ViT and DeiT) does not count: it is often untrained.
    """
    if getattr(model, "attn_pool", None) is not None:  # SigLIP in timm
        return model.forward_head(tokens, pre_logits=True), "forward_head, attention pool"  # type: ignore[operator]
    if hasattr(model, "joint_tokens"):  # vitrim's own pose models: what a joint is read from counts, each by itself
        return model.forward_head(tokens, pre_logits=True), "tokens of the joints"  # type: ignore[operator]
    pooled = getattr(output, "pooler_output", None)
    pooled = pooled[-1] if isinstance(pooled, tuple) else pooled
    several = isinstance(pooled, Tensor) and pooled.ndim > 2  # Ovis2: tokens in the words of its language model
    return (None, "") if several or hasattr(getattr(model, "pooler", None), "dense") else (pooled, "pooler_output")


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that gets every output of a module inside a `with` block."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _held(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute to another value inside a `with` block."""
    before = getattr(model, name)
    setattr(model, name, value)
    try:
        yield
    finally:
        setattr(model, name, before)
