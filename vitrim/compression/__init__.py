"""The main job and its variants: compress, prune file to file, slice, and the cut that they share."""
