"""Processes of a run: how they agree, how models are spread over them, on which device and in which precision."""
