"""Modules that take the place of a layer or of its weight. They know no model, file or image."""
