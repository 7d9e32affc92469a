"""The report of one compression: a single self-contained HTML page, pictures first."""
