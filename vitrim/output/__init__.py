"""What a run leaves behind: staging, saving, loading, verifying, exporting, uploading, and the model card."""
