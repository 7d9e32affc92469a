"""Foreign models: loading them, finding their MLPs, reading their features, writing them back."""
