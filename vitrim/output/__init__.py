"""What a run writes: staging, saving, loading, verifying, exporting, uploading, and the model card."""
