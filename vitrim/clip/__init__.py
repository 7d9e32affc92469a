"""Image and text towers of one embedding space: zero-shot, retrieval, tuning of the text tower."""
