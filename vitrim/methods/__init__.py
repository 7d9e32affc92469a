"""The methods: one file a paper. Importing this package registers them all."""

from vitrim.methods import corp, dgmr, low_rank, magnitude, moefication, random_units, relufy, top_k
from vitrim.methods.registry import METHODS, Method, MethodOptions, find_method

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "corp",
    "dgmr",
    "find_method",
    "low_rank",
    "magnitude",
    "moefication",
    "random_units",
    "relufy",
    "top_k",
]
