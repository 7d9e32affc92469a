"""Starts a run: finds a learning rate by short runs from one start, each with a full schedule, at falling rates."""

from __future__ import annotations

import math

from vitrim.config.options import RecoverOptions
from vitrim.progress import progress
from vitrim.recover.result import Validation
from vitrim.recover.run import Run
from vitrim.recover.schedule import rate_shape

# Rates of the range test, from the paper's own scale down; a repaired student wants the low end.
RATES = (2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
# SGD takes steps as large as gradients are.
SGD_RATES = (2e-1, 1e-1, 5e-2, 2e-2, 1e-2, 5e-3, 2e-3, 1e-3)
# Steps as shares of each weight's norm.
SHARES = (0.03, 0.01, 0.003, 0.001, 0.0003)
# LoRA's factors tolerate about 25 times the rate that the weights themselves do; OP-LoRA's generators do not.
LORA_RATES = (2e-2, 1e-2, 5e-3, *RATES)
# All short runs together take at most this share of the steps asked for, each one step at least and MOST_STEPS at most.
SHARE, MOST_STEPS = 0.1, 30
# A short run may end at this multiple of the error at the start, if that error is below NEAR.
SHOCK, NEAR = 1.5, 0.1


def rates_to_try(options: RecoverOptions) -> tuple[float, ...]:
    """Return the rates of the range test, the largest first; LoRA adapters start higher than weights."""
    if options.steps_are_shares:
        return SHARES
    if options.steps_by == "sgd":
        return SGD_RATES
    return LORA_RATES if options.adapter is not None and options.adapter.kind == "lora" else RATES


def start_(run: Run) -> Validation:
    """Judge the untrained student, keep it as the best so far, and find the rate if none was given."""
    first = run.validate(loss=math.nan)
    run.result.lr = run.options.peak_lr(run.sampler.global_batch) or find_rate(run)
    run.ema = {name: p.detach().clone() for name, p in run.named_parameters().items()} if run.options.ema else {}
    return first


def find_rate(run: Run) -> float:
    """Choose a learning rate, and leave the run as it was before its first step.

    Where a rate improves the student at once, the best such rate is taken. A repaired student is near its optimum: no
    short run improves it, all that shows is the shock of the first noisy steps; then the largest rate whose shock stays
    within SHOCK is taken, since the full run has the time to make up for it. A student that is not NEAR the original
    has everything to gain, so there a rate has to improve it.

    Args:
        run: judged at its start, with no step done; its `rate_test` gets the error at each rate tried.

    Returns:
        The chosen rate; the lowest one where all are too high.
    """
    rates = rates_to_try(run.options)
    num_steps = max(1, min(MOST_STEPS, int(SHARE * run.num_steps) // len(rates)))
    start = run.values()
    errors: dict[float, float] = {}
    chosen: float | None = None
    shock = SHOCK if run.result.curve[0]["relative_error"] < NEAR else 1.0
    with progress("range test", len(rates), quiet=run.context.quiet or not run.is_main) as bar:
        for rate in rates:
            for batches in run.batches(0, num_steps):
                run.train_step(batches, lr=rate * rate_shape(run.step, num_steps, run.options.warmup_ratio))
            run.result.num_test_steps += num_steps
            errors[rate] = run.score(run.judge.errors(run.judged))
            run.start_over_(start)
            bar.advance(1, f"rate {rate:g}: error {errors[rate]:.4f}")
            if chosen is not None and errors[rate] >= errors[chosen]:
                break
            if errors[rate] <= shock * run.best_score:
                chosen = rate
                if errors[rate] > run.best_score:
                    break
    run.result.rate_test = {f"{rate:g}": error for rate, error in errors.items()}
    return chosen or rates[-1]
