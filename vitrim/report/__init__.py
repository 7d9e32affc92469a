"""Report of a compression: a single self-contained HTML page, pictures first."""
