"""The errors that users meet, as one tree. Each message says where, what was found, what is allowed and what to do."""

# What reading JSON from a file and looking into it raises, where the file is missing, damaged or hostile.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


LONGEST_REASON = 300


def reason_of(error: BaseException | str) -> str:
    """Return what an error says in one line, cut behind a word; of a state dict, where it does not fit."""
    lines = [" ".join(line.split()) for line in str(error).strip().split("\n")]
    if lines[0].startswith("Error(s) in loading state_dict"):
        lines = sorted(lines[1:], key=lambda line: not line.startswith("size mismatch"))
    said = next(iter(lines), "") or type(error).__name__
    if len(said) <= LONGEST_REASON:
        return said
    kept = said[:LONGEST_REASON]
    return f"{kept.rpartition(' ')[0] or kept} …"


class VitrimError(Exception):
    """Base of every error that vitrim raises for its users; the command line prints it in one line, exit code 2."""

    def __str__(self) -> str:
        """Return one printable line: names in a hostile file may hold line breaks and terminal control codes."""
        line = " ".join(super().__str__().splitlines())
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class ModelError(VitrimError):
    """A model can't be found, read or rebuilt."""


class SiteNotFoundError(ModelError):
    """A model has no MLP that vitrim recognises, or a named module is missing."""


class BudgetError(VitrimError):
    """A width or a ratio is outside the range that the model allows."""


class RecipeError(VitrimError):
    """A recipe or an option has an unknown key or a value that is not allowed."""


class DataError(VitrimError):
    """A data source is missing, empty or unreadable."""


class OutputError(VitrimError):
    """An output can't be written to its place, or failed the check after writing."""


class NotFiniteError(OutputError):
    """A model that was to be written puts out NaN or infinity; the message names the tensor."""


class CheckpointError(VitrimError):
    """A checkpoint or a plan on disk is damaged or does not fit the model."""


class BelowLimitError(VitrimError):
    """A measure is below the limit that the user set for it; the command line exits with 1, not 2."""


class Interrupted(VitrimError):
    """The user stopped a run; the message says where everything needed to continue was saved."""


class MissingExtraError(VitrimError):
    """A required optional library is not installed."""
