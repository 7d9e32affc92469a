"""Cost of a model (parameters, MACs, time), and estimates of what a run takes (memory, disk, time)."""
