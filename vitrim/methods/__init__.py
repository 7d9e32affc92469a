"""The methods: one file a paper. Importing this package registers them all."""

from vitrim.methods import (
    amp,
    corp,
    dgmr,
    fips,
    int8,
    low_rank,
    magnitude,
    moefication,
    random_units,
    relufy,
    subspace_node,
    taylor,
    top_k,
    torch_pruning,
)
from vitrim.methods.registry import METHODS, Method, MethodOptions, ModelMethod, SiteMethod, find_method, make_method

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "amp",
    "corp",
    "dgmr",
    "find_method",
    "fips",
    "int8",
    "low_rank",
    "magnitude",
    "moefication",
    "random_units",
    "relufy",
    "subspace_node",
    "taylor",
    "top_k",
    "torch_pruning",
]
