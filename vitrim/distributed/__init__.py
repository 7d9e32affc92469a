"""The processes of a run: what they tell each other, how models are spread over them, and in which precision."""
