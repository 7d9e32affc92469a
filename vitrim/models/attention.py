"""Find the self-attentions of any model by structure: three projections (or one for all), heads, an output projection.

What is found is a candidate. Whether it is plain attention, without positions, norms or masks inside, is checked by
running it beside vitrim's own (`calibrate.LiveModelView.attentions`). No foreign class is named and no foreign
`forward` copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from vitrim.layers.attention import SlimAttention
from vitrim.types import AttentionSite

# Usual paths below an attention: queries, keys, values, output. The first kind has all three in one matrix.
NAMES = (
    ("qkv", "qkv", "qkv", "proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "proj"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("self.query", "self.key", "self.value", "output.dense"),
)
OWN = ("q", "k", "v", "proj")  # vitrim's own, whose heads an earlier step has cut
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "h")


def find_attentions(model: nn.Module, *, own: bool = False) -> Iterator[AttentionSite]:
    """Yield candidates in the order of the model's modules; with `own` also those that vitrim has put there."""
    for path, module in model.named_modules():
        for names in (*NAMES, *_by_structure(module, own=own)):
            site = _match(module, path, names)
            if site is not None:
                yield site
                break


def _by_structure(module: nn.Module, *, own: bool) -> list[tuple[str, str, str, str]]:
    """Return names of the 2 or 4 layers of a module that knows its heads, as those of an attention."""
    if isinstance(module, SlimAttention):
        return [OWN] if own else []
    if _num_heads([module]) is None:
        return []
    layers = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    if len(layers) == 2:
        return [(layers[0], layers[0], layers[0], layers[1])]
    return [(layers[0], layers[1], layers[2], layers[3])] if len(layers) == 4 else []


def _num_heads(modules: Iterable[nn.Module]) -> int | None:
    """Return the number of heads that the first of some modules has which has one."""
    known = (getattr(module, name, None) for module in modules for name in HEADS)
    return next((value for value in known if isinstance(value, int) and value > 0), None)


def _match(module: nn.Module, path: str, names: tuple[str, str, str, str]) -> AttentionSite | None:
    """Return a module as an attention whose layers have these names, or None if it is not one."""
    try:
        query, key, value, output = (module.get_submodule(name) for name in names)
    except AttributeError:
        return None
    layers = (query, key, value, output)
    num_heads = _num_heads(module.modules())
    if not all(type(layer) is nn.Linear for layer in layers) or num_heads is None:
        return None
    assert isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(output, nn.Linear)
    fused = names[0] == names[1]
    rows, rest = divmod(query.out_features, 3 if fused else 1)
    if rest or rows % num_heads or output.in_features != rows or key.out_features != query.out_features:
        return None
    head_dim = rows // num_heads
    query_path, key_path, value_path, output_path = (f"{path}.{name}".strip(".") for name in names)
    return AttentionSite(
        path=path,
        query=query_path,
        key=key_path,
        value=value_path,
        output=output_path,
        fused=fused,
        d_model=query.in_features,
        num_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        as_tuple=False,
    )
