"""`python -m vitrim` is the `vitrim` command."""

from vitrim.cli import main

if __name__ == "__main__":
    main()
