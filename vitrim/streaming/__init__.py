"""Checkpoints pruned file to file, for models that do not fit in memory."""

from vitrim.streaming.prune import Pruned, prune_checkpoint

__all__ = ["Pruned", "prune_checkpoint"]
