"""Repair of a cut MLP or block by itself: the local refit, and block by block from disk."""
