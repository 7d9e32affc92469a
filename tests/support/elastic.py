"""Recovery of one student at several widths."""

from __future__ import annotations

from tests.support.distillation import HELD_OUT, make_images, make_teacher
from vitrim.config.options import RecoverOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.models.sites import find_mlps
from vitrim.recover.distill import recover_
from vitrim.recover.elastic import Widths
from vitrim.recover.elastic_fit import Fitting, serving

OPTIONS = {"steps": 6, "batch_size": 8, "lr": 1e-3, "num_validations": 3, "elastic": (0.5, 1.0, 2.0)}


def elastic_run(student, teacher, *, work=None, resume=False, **kwargs):
    """Recovery at several widths, with output weights of their own; curve, widths and what each has for itself."""
    options = RecoverOptions(**{**OPTIONS, **kwargs.pop("options", {})})
    widths, images = widths_for(options), make_images()
    batches = [images[i][0][None] for i in range(16)]
    fitting = Fitting(teacher=teacher, batches=batches, held_out=HELD_OUT, options=RepairOptions(ridge=1e-2))
    with serving(student, widths, fitting) as slices:
        context = RunContext(work=work, resume=resume, quiet=True)
        given = {"held_out": HELD_OUT, "options": options, "context": context}
        result = recover_(student, teacher, images, **given, widths=widths, **kwargs)
    return result, widths, slices


def widths_for(options):
    return Widths.of(Recipe(recover=options, round_to=1), find_mlps(make_teacher()))
