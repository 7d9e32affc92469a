"""vitrim makes pretrained Vision Transformers smaller and keeps their features."""

from vitrim.compression.file_to_file import prune_checkpoint
from vitrim.compression.pipeline import Result, compress
from vitrim.config.recipe import Recipe
from vitrim.errors import VitrimError
from vitrim.evaluation import evaluate
from vitrim.inspection import Inspection, inspect
from vitrim.output.load import load

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
