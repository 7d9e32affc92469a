"""AMP (arXiv 2603.08100): entropy, scores, the search for widths, and the mistakes that its code makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files

import pytest
import torch
from torch import Tensor

import vitrim
from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import RecipeError
from vitrim.methods import Amp, amp
from vitrim.models.features import features
from vitrim.surgery import KeepUnits, apply_, read_weights, submodule
from vitrim.tokens import Features
from vitrim.types import MlpSite

TAU = 15.0


def bench_of(case, *, width=10, batches=None):
    widths = {site.path: width for site in case.sites}
    return LiveModelView(case.copy(), case.sites, widths, case.batches if batches is None else batches, seed=0)


def orders(bench):
    """Every unit of each MLP, the best first: what a budget that nothing meets leaves."""
    return {edit.site.path: edit.keep for edit in propose(bench, delta=-1e9)}


def propose(view, **options):
    return list(Amp(**options).propose(view))


def mean_entropy(model, batches, tau=TAU):
    """The paper's E, by its definition."""
    rows = []
    for batch in batches:
        with torch.inference_mode():
            unit = torch.nn.functional.normalize(features(model, batch).pooled_BD.double(), dim=1)
        for i in range(len(unit)):
            weights = [math.exp(tau * float(unit[i] @ unit[j])) for j in range(len(unit))]
            rows.append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
    return sum(rows) / len(rows)


def test_amp_entropy_lies_between_zero_and_log_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 7, 30):
        found = amp.entropies(torch.randn(size, 5, generator=generator), TAU)
        assert found.shape == (size,) and float(found.min()) >= 0 and float(found.max()) <= math.log(size)
        same = amp.entropies(torch.randn(5, generator=generator).expand(size, 5), TAU)
        torch.testing.assert_close(same, torch.full((size,), math.log(size)))


def test_amp_entropy_is_that_of_its_definition_self_included(build):
    case = build("timm-vit")
    found = torch.cat([amp.entropies(part, TAU) for part in bench_of(case).pooled()]).double().mean()
    assert float(found) == pytest.approx(mean_entropy(case.model, case.batches), abs=1e-5)


def test_amp_entropy_of_far_apart_images_is_zero_and_never_nan():
    """p log p of a p that underflows."""
    apart = torch.eye(4).requires_grad_()
    found = amp.entropies(apart, 1e4)
    assert float(found.detach().abs().max()) < 1e-6
    assert bool(torch.autograd.grad(found.sum(), apart)[0].isfinite().all())


def test_amp_gradient_matches_finite_differences(build):
    case = build("timm-vit")
    model, site = case.copy().double(), case.sites[0]
    bench = LiveModelView(model, case.sites, {}, [case.batches[0].double()], seed=0)
    generator, seen = torch.Generator().manual_seed(0), []

    def loss(found: Features) -> Tensor:
        return amp.entropies(found.pooled_BD, TAU).mean()

    bench.differentiate(loss, [site.output], lambda _, hidden, gradient: seen.append((hidden, gradient)))
    (hidden, gradient), step = seen[0], 1e-5
    direction = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    sides = []
    for sign in (1, -1):
        handle = submodule(model, site.output).register_forward_pre_hook(
            lambda _, args, s=sign: (args[0] + s * step * direction,)
        )
        with torch.inference_mode():
            sides.append(float(loss(features(model, case.batches[0].double()))))
        handle.remove()
    assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5)


def test_amp_scores_are_images_means_of_absolute_sums_over_tokens(build):
    case = build("timm-vit")
    bench, sums = bench_of(case), {}

    def see(path, hidden, gradient):
        for image in range(len(hidden)):
            own = [abs(float(v)) for v in (hidden[image].double() * gradient[image].double()).sum(0)]
            sums[path] = [a + b for a, b in zip(sums.get(path, [0.0] * len(own)), own, strict=True)]

    bench.differentiate(lambda found: amp.entropies(found.pooled_BD, TAU).mean(), [s.output for s in case.sites], see)
    for site in case.sites:
        mine = torch.tensor(sums[site.output])[list(orders(bench)[site.path])]
        assert bool((mine[1:] <= mine[:-1] * (1 + 1e-4)).all())


def test_amp_duplicated_images_leave_the_order_of_scores_unchanged(build):
    case = build("timm-vit")
    twice = [torch.cat([batch, batch]) for batch in case.batches]
    once, again = orders(bench_of(case)), orders(bench_of(case, batches=twice))
    for path in once:  # near ties may swap in float32
        moved = [abs(once[path].index(unit) - rank) for rank, unit in enumerate(again[path])]
        assert max(moved) <= 2 and sum(moved) < len(moved) / 4


def test_amp_keeping_all_units_changes_nothing_and_zeroed_units_are_sliced_units(kind):
    bench = bench_of(kind)
    dense = bench.pooled()
    everything = {site.output: torch.tensor([], dtype=torch.int64) for site in kind.sites}
    assert all(torch.equal(a, b) for a, b in zip(bench.pooled(everything), dense, strict=True))
    if any(site.norm for site in kind.sites):  # a norm over the units sees other statistics once they are gone
        return
    sliced = kind.copy()
    apply_(sliced, [KeepUnits(site=site, keep=tuple(range(7))) for site in kind.sites])
    zeroed = bench.pooled({site.output: torch.arange(7, site.d_hidden) for site in kind.sites})
    for batch, mine, before in zip(kind.batches, zeroed, dense, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(mine, features(sliced, batch).pooled_BD, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(mine, before, atol=1e-3)


def test_amp_a_packed_gated_mlp_loses_gate_and_value_of_a_unit_together(build):
    case = build("timm-packed")
    student = case.copy()
    recipe = Recipe.parse({"method": "amp", "hidden_dim": 9})
    for edit in cut_(student, case.model, case.sites, recipe, case.batches, quiet=True).plan.edits:
        old, new = read_weights(case.model, edit.site), read_weights(student, edit.site)
        assert torch.equal(new.gate_HD, old.gate_HD[list(edit.keep)])
        assert torch.equal(new.value_HD, old.value_HD[list(edit.keep)])


def slow_widths(case, order, delta, trials=6):
    """The paper's search, on models that are really cut: widths, and by how much each layer raised the entropy."""

    def entropy(kept):
        model = case.copy()
        apply_(model, [KeepUnits(site=s, keep=order[s.path][: kept[s.path]]) for s in case.sites])
        return mean_entropy(model, case.batches)

    kept = {site.path: site.d_hidden for site in case.sites}
    before, rises = entropy(kept), []
    for site in reversed(case.sites):
        low, high, best = 0, site.d_hidden, before
        for _ in range(trials):
            middle = (low + high) // 2
            found = math.inf if middle == 0 else entropy({**kept, site.path: middle})
            if found - before <= delta:
                high, best = middle, found
            else:
                low = middle
        kept[site.path] = high
        rises.append(best - before)
        before = best
    return kept, rises


@pytest.mark.parametrize("delta", [1e-3, 2e-2])
def test_amp_widths_are_those_of_the_papers_search_and_no_layer_costs_more_than_delta(build, delta):
    case = build("timm-vit")
    bench = bench_of(case)
    wanted, rises = slow_widths(case, orders(bench), delta)
    found = {edit.site.path: len(edit.keep) for edit in propose(bench, delta=delta, guard=None)}
    assert found == wanted and max(rises) <= delta
    assert any(width < 96 for width in found.values())


def test_amp_a_budget_that_nothing_meets_prunes_nothing_and_one_that_all_meets_leaves_a_64th(build):
    case = build("timm-vit")
    none, everything = (propose(bench_of(case), delta=delta, guard=None) for delta in (-1e9, 1e9))
    assert [len(edit.keep) for edit in none] == [96, 96]
    assert [len(edit.keep) for edit in everything] == [max(1, 96 // 64)] * 2


@dataclass(kw_only=True)
class Script:
    """A view without a model: features by how many units of each MLP are silenced."""

    features_of: Callable[[int, int], Tensor]
    num_units: int = 64
    widths: dict = field(default_factory=dict)

    def __post_init__(self):
        self.sites = tuple(
            MlpSite(path=name, kind="plain", d_model=4, d_hidden=self.num_units, value=f"{name}.i", output=f"{name}.o")
            for name in ("first", "last")
        )

    def pooled(self, silenced=None, *, num_images=None):
        num_silenced = {path.split(".")[0]: len(units) for path, units in (silenced or {}).items()}
        return [self.features_of(num_silenced.get("first", 0), num_silenced.get("last", 0))]

    def track(self, items, words):
        return iter(items)

    def note(self, text):
        assert text.startswith("amp: these widths")

    def differentiate(self, loss, paths, see):
        for path in paths:
            see(path, torch.ones(2, 3, self.num_units), torch.arange(self.num_units, 0, -1.0).expand(2, 3, -1))


def at_angle(angle):
    """Two images this far apart, in radians: the farther apart, the lower the entropy."""
    return torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])


def widths_of(view, **options):
    return {edit.site.path: len(edit.keep) for edit in propose(view, **options)}


def test_amp_an_entropy_that_falls_passes_any_budget_but_not_the_guard():
    view = Script(features_of=lambda first, last: at_angle(0.3 + 0.5 * bool(first + last)))  # images fly apart
    assert widths_of(view, delta=1e-3, guard=None) == {"first": 1, "last": 1}
    assert widths_of(view, delta=1e-3, guard=1.0) == {"first": 64, "last": 64}
    assert widths_of(Script(features_of=lambda first, last: at_angle(0.3)), delta=1e-3) == {"first": 1, "last": 1}


def test_amp_a_layer_of_which_every_trial_fails_leaves_the_entropy_where_it_was():
    """Counted from the last, refused trial, what the first layer costs would look like nothing."""
    view = Script(features_of=lambda first, last: at_angle(0.5 - 0.4 * bool(last) - 0.4 * bool(first)))
    assert widths_of(view, delta=1e-3, guard=None) == {"first": 64, "last": 64}
    spent = amp.entropies(at_angle(0.1), TAU).mean() - amp.entropies(at_angle(0.5), TAU).mean()
    assert widths_of(view, delta=float(spent) * 1.01, guard=None)["last"] == 1


def test_amp_batches_are_always_the_same_and_so_are_their_features(build):
    """The entropy depends on which images share a batch."""
    case = build("timm-vit")
    bench = bench_of(case)
    first = bench.pooled()
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, bench.pooled(), strict=True))
    assert [len(part) for part in bench.pooled(num_images=4)] == [3, 3]
    with torch.inference_mode():
        assert torch.equal(first[1], features(case.model, case.batches[1]).pooled_BD)


def test_amp_meets_a_budget_exactly_and_spreads_it(build):
    case = build("timm-vit")
    for width in (5, 30, 95, 96):
        found = [len(edit.keep) for edit in propose(bench_of(case, width=width), rounds=4)]
        assert sum(found) == 2 * width and min(found) >= 1
    assert found == [96, 96]
    view = Script(
        features_of=lambda first, last: at_angle(0.5 - first / 200 - last / 2000), widths={"first": 30, "last": 30}
    )
    found = widths_of(view)
    assert found["first"] > 30 > found["last"] and sum(found.values()) == 60


def test_amp_mixed_widths_have_the_total_and_lie_between():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        pair = torch.randint(1, 40, (2, 5), generator=generator)
        few, many = (dict(enumerate(row)) for row in sorted(pair.tolist(), key=sum))  # though not in every layer
        total = int(torch.randint(sum(few.values()), sum(many.values()) + 1, (), generator=generator))
        mixed = amp._between(few, many, total)
        assert sum(mixed.values()) == total
        assert all(min(few[key], many[key]) <= mixed[key] <= max(few[key], many[key]) for key in few)


def test_amp_needs_two_images_in_a_batch(build):
    case = build("timm-vit")
    with pytest.raises(RecipeError, match="compares the images of a batch"):
        propose(bench_of(case, batches=[batch[:1] for batch in case.batches]))


def test_differentiating_leaves_the_model_as_it_was(build):
    case = build("timm-vit")
    bench, paths = bench_of(case), [site.output for site in case.sites]
    model = bench.model.train()
    frozen = model.patch_embed.proj.weight.requires_grad_(False)
    seen = []
    bench.differentiate(lambda found: found.pooled_BD.sum(), paths, lambda path, *_: seen.append(path))
    assert seen == paths * len(case.batches)
    with pytest.raises(ZeroDivisionError):
        bench.differentiate(lambda found: 1 / 0, paths, lambda *_: None)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_amp_widths_that_differ_are_saved_and_load_again(tmp_path):
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    options = {"rounds": 2, "trials": 3}
    calibrate = {"num_images": 32, "batch_size": 16}
    recipe = Recipe.parse({"method": "amp", "keep_ratio": 0.5, "options": options, "calibrate": calibrate})
    found = vitrim.compress(model, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert len({width for _, width in found.metrics.widths.values()}) > 1
    assert found.metrics.reload_difference <= 1e-6
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(images), found.model(images))
