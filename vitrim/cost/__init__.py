"""What a model costs (parameters, MACs, time) and what a run will need (memory, disk)."""
