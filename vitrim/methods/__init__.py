"""The methods: one file a paper. Importing this package registers them all."""

from vitrim.methods import dgmr, low_rank, magnitude, moefication, random_units, relufy, top_k
from vitrim.methods.registry import METHODS, Method, MethodOptions, find_method

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "dgmr",
    "find_method",
    "low_rank",
    "magnitude",
    "moefication",
    "random_units",
    "relufy",
    "top_k",
]
