"""Models written by hand: attention under any names, 8-bit images, and loading into an instance that was passed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import vitrim
from vitrim.errors import CheckpointError, ModelError, RecipeError

FEW = {"calibrate": {"num_images": 40}, "effort": "fast"}


class Attend(nn.Module):
    """Attention with names of its own, one matrix for queries, keys and values or three."""

    def __init__(self, width, heads, *, split):
        super().__init__()
        self.heads = heads
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(3)) if split else nn.Linear(width, 3 * width)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, tokens):
        parts = (
            [layer(tokens) for layer in self.mix]
            if isinstance(self.mix, nn.ModuleList)
            else self.mix(tokens).chunk(3, -1)
        )
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block whose modules have no known names."""

    def __init__(self, width, hidden, look):
        super().__init__()
        self.a, self.b, self.look = nn.LayerNorm(width), nn.LayerNorm(width), look
        self.think = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens):
        tokens = tokens + self.look(self.a(tokens))
        return tokens + self.think(self.b(tokens))


class Bare(nn.ModuleDict):
    """A block that nobody calls: the model runs its parts."""

    def __init__(self, width, hidden, look):
        super().__init__(dict(Block(width, hidden, look).named_children()))


class Own(nn.Module):
    """A small ViT."""

    def __init__(self, width=32, depth=2, hidden=64, *, split=False, attend=Attend, block=Block):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.place = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.layers = nn.ModuleList(block(width, hidden, attend(width, 4, split=split)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT + self.place
        for layer in self.layers:
            tokens = Block.forward(layer, tokens) if isinstance(layer, Bare) else layer(tokens)
        return self.norm(tokens)


class Bent(Attend):
    """Not plain, and not linear in its values."""

    def __init__(self, width, heads, *, split):
        super().__init__(width, heads, split=split)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(width, width))


class Apart(nn.Module):
    """No attention that could be seen: it does not say how many heads it has."""

    def __init__(self, width, heads, *, split):
        super().__init__()
        self.inside = Attend(width, heads, split=split)
        self.inside.count, self.inside.heads = heads, None

    def forward(self, tokens):
        self.inside.heads = self.inside.count
        try:
            return self.inside(tokens)
        finally:
            self.inside.heads = None


def make(**values):
    torch.manual_seed(0)
    return Own(**values).eval()


IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", [False, True])
def test_attention_is_cut_under_any_names_and_loads_into_an_instance(split, tmp_path):
    model = make(split=split)
    recipe = {**FEW, "keep_ratio": 0.5, "options": {"parts": "both"}}
    found = vitrim.compress(model, data=IMAGES, recipe=recipe, out=tmp_path / "out", quiet=True)
    kinds = [edit.KIND for edit in found.plan.edits]
    assert kinds == ["keep_head_dims", "keep_units"] * 2
    assert found.metrics.after.parameters < 0.66 * found.metrics.before.parameters
    assert found.metrics.after_cut.relative_error < 0.6
    loaded = vitrim.load(tmp_path / "out", model=make(split=split))
    assert torch.equal(loaded(IMAGES[:2]), found.model(IMAGES[:2]))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"attend": Bent}, r"layers\.0\.look: no plain attention"),
        ({"attend": Apart}, "holds one nn"),
        ({"block": Bare}, r"layers\.0\.look is in no block, a module that runs it and an MLP"),
    ],
)
def test_where_attention_can_not_be_cut_it_is_said_why(given, why):
    recipe = {**FEW, "keep_ratio": 0.5, "options": {"parts": "both"}}
    with pytest.raises(RecipeError, match=rf"options\.parts: this model has no .*{why}.*use parts='mlp'") as error:
        vitrim.compress(make(**given), data=IMAGES, recipe=recipe, quiet=True)
    assert "\n" not in str(error.value)


def test_what_is_passed_to_load_is_checked_in_a_line(tmp_path):
    vitrim.compress(make(), method="magnitude", mlp_ratio=1, out=tmp_path / "out", quiet=True)
    for given, error, message in (
        (
            Own,
            ModelError,
            r"model: is Own itself, which makes models; pass model=Own\(\.\.\.\), built with the arguments",
        ),
        (lambda: make(), ModelError, "itself, which makes models"),
        ("own", ModelError, "model: is str; pass a module, built with"),
        (make(width=48), CheckpointError, "does not fit the model that was passed; build it with the arguments of"),
        (make(depth=1), CheckpointError, "does not fit the model that was passed; build it with the arguments of"),
        (make(depth=3), CheckpointError, "does not fit the model that was passed; build it with the arguments of"),
    ):
        with pytest.raises(error, match=message) as caught:
            vitrim.load(tmp_path / "out", model=given)
        assert "\n" not in str(caught.value)
    assert vitrim.load(tmp_path / "out", model=make()).layers[0].think[0].out_features == 32


def test_pictures_for_a_model_of_unknown_preprocessing_are_scaled_and_that_is_said():
    pixels = (IMAGES.sigmoid() * 255).to(torch.uint8)
    given = {"method": "magnitude", "mlp_ratio": 1, "recipe": FEW, "quiet": True}
    of_bytes, of_floats = (vitrim.compress(make(), data=data, **given).metrics for data in (pixels, pixels / 255))
    assert of_bytes.after_cut.relative_error == of_floats.after_cut.relative_error
    said = "Own: how it wants images is not known, so they went in at their own size, scaled to 0..1"
    assert any(note.startswith(said) for note in of_bytes.notes)
    assert not any("scaled to 0..1" in note for note in of_floats.notes)
    found = vitrim.evaluate(make(), make(), pixels, latency=False, quiet=True)
    assert any(note.startswith(said) for note in found.notes)
