"""Foreign models: load them, find their MLPs, read their features, write their configs."""
