"""The command line: the same recipe as the Python API, tables for people, one JSON document with --json."""

from vitrim.cli import look, make, share, zoo
from vitrim.cli.app import app, main, run

__all__ = ["app", "look", "main", "make", "run", "share", "zoo"]
