"""The command that plans a run on GPUs that are elsewhere: plan-run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from vitrim.cli.app import Json, app
from vitrim.cli.console import print_json, print_table, say
from vitrim.cli.make import NO_BUDGET, NO_CUT, NO_TRAINING, recipe_of
from vitrim.cli.options import BudgetOptions, CutOptions, SourceOptions, TrainOptions

AS_NAMED = SourceOptions()
# What `compress` calls the length of a distillation.
LENGTHS = {"steps": "recover_steps", "epochs": "recover_epochs"}


@app.command
def plan_run(
    model: str,
    *,
    images: int,
    gpus: int,
    gpu: Literal["h100", "a100", "l40s"],
    data: str = "photos/",
    out: str = "small",
    budget: BudgetOptions = NO_BUDGET,
    cut: CutOptions = NO_CUT,
    reading: SourceOptions = AS_NAMED,
    train: TrainOptions = NO_TRAINING,
    as_json: Json = False,
) -> None:
    """Say what compress takes on several GPUs: memory of each, least time, fewest processes, and the command to start.

    Example: vitrim plan-run timm/vit_base_patch14_dinov2.lvd142m --images 1000000 --gpus 8 --gpu h100 --mlp-ratio 1

    Args:
        model: as for compress; no weights are read.
        images: how many images there are to train on.
        gpus: how many GPUs there are, one process for each.
        gpu: their kind.
        data: images, for the command; they are not opened.
        out: folder, for the command; nothing is written.
    """
    from vitrim.compression.plan_run import plan_run as plan

    given = {**reading.given(), **budget.given(), **cut.given(), **train.given()}
    found = plan(model, recipe_of(cut, {"model": model, **given}), images=images, gpus=gpus, gpu=gpu)
    asked = {**reading.__dict__, **budget.__dict__, **cut.__dict__, **train.__dict__}
    options = {**asked, **{LENGTHS.get(name, name): value for name, value in found.options.items()}}
    start = " ".join([*_starter(found.setup.processes), *_words(model, {"data": data, "out": out, **options})])
    if as_json:
        return print_json({**found.to_json(), "command": start})
    print_table((model, ""), found.rows())
    say(start)


def _starter(processes: int) -> Iterator[str]:
    """Yield the words that start a command in so many processes."""
    from vitrim.cost.training import nodes_of

    nodes, each = nodes_of(processes)
    if processes == 1:
        return
    yield "torchrun"
    if nodes == 1:
        yield "--standalone"
    else:  # the name of the first machine is known to who starts it
        yield from ("--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", '"$HEAD:29500"')
    yield from ("--nproc_per_node", str(each), "--no-python")


def _words(model: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of the command."""
    yield from ("vitrim", "compress", shlex.quote(model))
    for name, value in options.items():
        word = name.replace("_", "-")
        if value is None or (value is False and name not in ("repair", "refit")):
            continue
        if isinstance(value, bool):
            yield f"--{word}" if value else f"--no-{word}"
            continue
        for each in value if isinstance(value, list) else [value]:
            yield from (f"--{word}", shlex.quote(f"{each:g}" if isinstance(each, float) else str(each)))
