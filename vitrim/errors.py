"""The errors that users meet, as one tree. Each message says where, what was got, what is allowed, what next."""

# What reading JSON from a file and looking into it raises, where the file is missing, damaged or hostile.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class VitrimError(Exception):
    """Base of every error that vitrim raises for its users; the command line prints it in one line, exit code 2."""

    def __str__(self) -> str:
        """One printable line: names in a hostile file hold line breaks, and codes that a terminal obeys."""
        line = " ".join(super().__str__().splitlines())
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class ModelError(VitrimError):
    """A model could not be found, read or rebuilt."""


class SiteNotFoundError(ModelError):
    """A model has no MLP that vitrim recognises, or a named one is not there."""


class BudgetError(VitrimError):
    """A width or a ratio is outside what the model allows."""


class RecipeError(VitrimError):
    """A recipe or an option has an unknown key or a value that is not allowed."""


class DataError(VitrimError):
    """A data source is missing, empty or unreadable."""


class OutputError(VitrimError):
    """An output can't be written where it was asked for, or did not survive the check after writing."""


class CheckpointError(VitrimError):
    """A checkpoint or a plan on disk is damaged or does not fit."""


class Interrupted(VitrimError):
    """The user stopped a run; what it needs to go on was kept where the message says."""


class MissingExtraError(VitrimError):
    """An optional library is needed and not installed."""
