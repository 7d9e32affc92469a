"""The check of a written folder in this process, which spares each test the seconds of a fresh one."""

from __future__ import annotations

import contextlib
import io
import warnings

import torch

from vitrim.output.verify import Check


def in_this_process(check: Check) -> float:
    """As `vitrim.output.verify.in_fresh_process` does, but vitrim stays importable."""
    names = {"folder": str(check.folder), "probe": check.probe, "encoder": check.encoder}
    names |= {"original": dict(check.original), "image_file": io.BytesIO(check.image)}
    with warnings.catch_warnings(), torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            exec(check.code, names)
        except Exception as error:
            raise check.failed(f"{type(error).__name__}: {error}") from error
    return names["difference"]
