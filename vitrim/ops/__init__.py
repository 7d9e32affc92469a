"""Pure tensor maths. Nothing here knows a model, a file or an image."""
