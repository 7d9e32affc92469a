"""A teacher, a student whose blocks are looped, and the training of its early exits, by one process or by several."""

from __future__ import annotations

import copy
import os
import sys
from functools import partial
from pathlib import Path

import torch

import vitrim
from tests.support.distillation import HELD_OUT, make_images
from tests.support.models import timm_vit
from vitrim.compression.cut import cut_
from vitrim.config.options import ExitOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.models.exits import Loops
from vitrim.models.sites import find_mlps
from vitrim.recover.exits import train_exits_


def make_pair(num_blocks=2):
    """A teacher of six blocks and a student of two that are looped three times."""
    torch.manual_seed(0)
    teacher = timm_vit(depth=6, img_size=16, init_values=0.5).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student = copy.deepcopy(teacher)
    options = {"num_blocks": num_blocks, "rank": 2, "norms": "own"}
    recipe = Recipe.parse({"method": "recursive", "options": options})
    cut_(student, teacher, find_mlps(student), recipe, None, quiet=True)
    return teacher, student


def train(student, teacher, *, work=None, resume=False, on_validation=None, **values):
    options = ExitOptions(**{"steps": 12, "batch_size": 8, "num_validations": 4, "lr": 0.003, **values})
    context = RunContext(work=work, resume=resume, quiet=True)
    return train_exits_(student, teacher, make_images(), held_out=HELD_OUT, options=options, context=context)


def alone_and_in_a_job():
    """Return outputs at all exits and curves of two trainings: by itself with a rate that is found, and in a whole job.

    Weights are no measure: a key's bias changes no softmax, so that its gradient is rounding.
    """
    teacher, student = make_pair()
    found = train(student, teacher, lr=None, steps=8, num_validations=2)
    exits = {"steps": 2, "batch_size": 8, "lr": 0.003}
    recipe = {"method": "recursive", "options": {"num_blocks": 2, "rank": 2}, "exits": exits}
    whole = vitrim.compress(teacher, data=make_images(), recipe=recipe, quiet=True)
    with torch.no_grad():
        outputs = [torch.stack(Loops(model).exits(partial(model, HELD_OUT[0]))) for model in (student, whole.model)]
    return list(zip(outputs, (found.curve, whole.metrics.exits["curve"]), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = alone_and_in_a_job()
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[1]))
