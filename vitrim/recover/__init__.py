"""Getting the features back: the local refit of one MLP, and distillation of the whole model without labels."""
