"""The leaderboard's command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from vitrim.cli.app import Json, app, hush
from vitrim.cli.console import print_json, print_table, say

# Columns that do not fit on a terminal of 80 characters.
IN_FILE_ONLY = ("MACs", "weights (MB)", "top-1 %, cut", "seconds")


@app.command
def leaderboard(
    model: Annotated[str | None, Parameter(name=["--model", "--teacher"])] = None,
    *,
    data: str = "digits",
    methods: str | None = None,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    recover_steps: int = 0,
    recipe: Path | None = None,
    baselines: str = "random,magnitude",
    out: Path = Path("vitrim-leaderboard"),
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Run every method at the same size, with the same images and recovery, and show who does best.

    Example: vitrim leaderboard timm/vit_small_patch14_dinov2.lvd142m --data photos/ --params-ratio 0.5

    Args:
        model: the model to make smaller, as for compress; by default the digits ViT that comes with vitrim.
        data: images, as for compress; with labels and a classifier head, top-1 is measured too.
        methods: names of methods, separated by commas; by default all.
        params_ratio: share of the model's parameters to keep; 0.5 if neither ratio is given.
        macs_ratio: share of the model's multiply-accumulates to keep.
        recover_steps: distillation steps for each row.
        recipe: YAML file with calibration, repair and recovery for every row.
        baselines: methods to compare the others with, separated by commas; the verdict names those that do worse.
        out: folder for leaderboard.json and leaderboard.md; rows already there are kept.
        seed: random seed; equal seeds give equal results.
        device: auto, cpu, cuda or mps.
        quiet: show no progress.
    """
    from vitrim.compression.leaderboard import leaderboard as run
    from vitrim.report.leaderboard import judged_on, table

    found = run(
        model,
        data=data,
        methods=() if methods is None else methods.split(","),
        params_ratio=params_ratio,
        macs_ratio=macs_ratio,
        recover_steps=recover_steps,
        recipe=recipe,
        baselines=baselines.split(","),
        out=out,
        seed=seed,
        device=device,
        quiet=hush(quiet or as_json),
    )
    if as_json:
        return print_json(found)
    header, rows = table(found)
    shown = [number for number, title in enumerate(header) if title not in IN_FILE_ONLY]
    print_table([header[number] for number in shown], [[_styled(row[number]) for number in shown] for row in rows])
    for line in [*judged_on(found), *found["verdict"]]:
        say(line)
    say(f"All columns: {out / 'leaderboard.md'}, all values: {out / 'leaderboard.json'}")


def _styled(cell: str) -> str | Text:
    """Return a cell as it is, or in bold if it is bold in Markdown."""
    return Text(cell.strip("*"), style="bold") if cell.startswith("**") else cell
