"""Tensors in files, read by name and written to known places, and the JSON beside them."""
