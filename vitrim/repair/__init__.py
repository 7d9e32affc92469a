"""Repair of a cut MLP or block by itself: least squares, the local refit, and training block by block from disk."""
