"""vitrim makes pretrained Vision Transformers smaller and keeps their features."""

from vitrim.checkpoint import load
from vitrim.errors import VitrimError
from vitrim.evaluation import evaluate
from vitrim.inspection import Inspection, inspect
from vitrim.pipeline import Result, compress
from vitrim.recipe import Recipe
from vitrim.streaming import prune_checkpoint

__all__ = [
    "Inspection",
    "Recipe",
    "Result",
    "VitrimError",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "prune_checkpoint",
]
