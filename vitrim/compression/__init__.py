"""The main job and its relatives: compress, prune file to file, slice, and the cut that they share."""
