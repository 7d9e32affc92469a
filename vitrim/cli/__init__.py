"""The command line: the same recipe as the Python API, tables for people, one JSON document with --json."""

from vitrim.cli import leaderboard, look, make, share
from vitrim.cli.app import app, main, run

__all__ = ["app", "leaderboard", "look", "main", "make", "run", "share"]
