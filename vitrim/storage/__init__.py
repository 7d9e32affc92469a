"""Tensors in files: read by name, written to known places, and the JSON beside them."""
