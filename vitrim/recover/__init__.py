"""Recovery of a cut model: distillation of the original into it, without labels."""
