"""The tests of vitrim; what several of them use lies in `tests.support`."""
