"""The command line: the same recipes as the Python API, with tables for people or one JSON document (--json)."""

from vitrim.cli import leaderboard, look, make, plan, share
from vitrim.cli.app import app, main, run

__all__ = ["app", "leaderboard", "look", "main", "make", "plan", "run", "share"]
