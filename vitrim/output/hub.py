"""Uploads an output folder to the Hugging Face hub. Nothing is sent unless the caller confirms it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrim.errors import OutputError, RecipeError, reason_of
from vitrim.output.card import CARD
from vitrim.output.load import read_about


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An upload, done or planned: the repository, and files with their sizes; `url` is None if nothing was sent."""

    repo: str
    private: bool
    files: dict[str, int]
    url: str | None = None


def push(folder: str | Path, repo: str, *, confirm: bool, private: bool = True) -> Upload:
    """Upload an output to a model repository, which is created if it does not exist.

    Args:
        folder: a folder that vitrim wrote.
        repo: `ORG/NAME`.
        confirm: send the files; if False, nothing is sent and the result only lists them.
        private: make a new repository private; an existing one is not changed.

    Raises:
        CheckpointError: vitrim did not write the folder.
        OutputError: the folder has no model card, or the hub refuses the upload.
        RecipeError: the repository name is not valid on the hub.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> small = vitrim.compress(digits, method="magnitude", mlp_ratio=1, out=folder / "small", quiet=True)
        >>> upload = vitrim.push(small.out, "my-org/digits-small", confirm=False)
        >>> "model.safetensors" in upload.files, upload.url
        (True, None)
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    read_about(folder)
    if not (folder / CARD).is_file():
        raise OutputError(f"{folder}: has no model card ({CARD}); write one, so that others know what this model is.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repo: {repo!r} is no name on the hub ({reason_of(error)}).") from None
    if "/" not in repo:
        raise RecipeError(f"repo: {repo!r} names nobody; give ORG/NAME.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    if not confirm:
        return Upload(repo=repo, private=private, files=files)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Made smaller with vitrim")
    except (HfHubHTTPError, OSError, ValueError) as error:  # no such token, no rights, no network
        reason = reason_of(error)
        raise OutputError(f"{repo}: the hub did not take it ({reason}); see `hf auth login`.") from None
    return Upload(repo=repo, private=private, files=files, url=str(done.commit_url))
