"""The commands of the documentation run, page by page, on tiny stand-ins for the models and images that they name.

Left out are other programs (make, torchrun), benchmarks, what needs ../shared, and `push`, which tests/test_share.py
tries on a hub of its own.
"""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

import vitrim
from tests.support.checkpoints import VIT, timm_folder, timm_shards
from tests.support.documents import PAGES, ROOT, blocks_of, commands_of, name
from tests.support.family import randomised
from tests.support.pairs import write_pair
from tests.support.texts import WORDS, bert_tokenizer, build_bert
from tests.support.vlms import build_vlm
from vitrim.cli.app import run

SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}
# What a name in the documentation stands for here, by how it starts.
STAND_INS = {"timm/swin": "swin", "timm/": "vit", "open_clip/": "pair", "hf/Qwen/": "vlm", "hf/": "bert"}
FINISHED = ("small", "relu")  # how folders of finished runs are called, or begin
MORE = {"leaderboard": ["--methods", "random"]}  # all methods take minutes


def runnable(page: Path) -> list[list[str]]:
    """The arguments of the commands of a page that are vitrim's own and need nothing that is not here."""
    found = [words[1:] for _, words in commands_of(page) if words[0] == "vitrim" and words[1] != "push"]
    return [words for words in found if not any(word.startswith("../shared") for word in words)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one small model of each kind, and one that has been cut."""
    root = tmp_path_factory.mktemp("models")
    timm_folder(root / "vit", "vit_tiny_patch16_224", VIT)
    timm_folder(root / "swin", "swin_tiny_patch4_window7_224", SWIN)
    write_pair("open_clip", root / "pair")
    build_vlm("Qwen2.5-VL").save_pretrained(root / "vlm")
    build_bert().save_pretrained(root / "bert")
    bert_tokenizer().save_pretrained(root / "bert")
    vitrim.compress(str(root / "vit"), method="magnitude", mlp_ratio=2, out=root / "small", quiet=True)
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    randomised(lambda: ViTModel(config)).save_pretrained(root / "small-vit")
    return root


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A working folder as a backend has it."""
    monkeypatch.chdir(tmp_path)
    timm_shards(tmp_path / "EVA-CLIP-E")
    (tmp_path / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number}.png")
    small = {"embed_dim": 192, "depth": 3, "num_classes": 0}  # what tensors tell
    trained = timm.create_model("vit_base_patch16_224", img_size=(224, 448), global_pool="avg", **small)
    torch.save({"model": trained.state_dict(), "args": {"num_heads": 12}}, tmp_path / "best.pth")
    np.save(tmp_path / "photos.npy", torch.randn(30, VIT["embed_dim"], generator=generator).numpy())
    (tmp_path / "notes.txt").write_text("\n".join(" ".join(WORDS) for _ in range(60)))
    return tmp_path


def prepared(words: list[str], page: Path, here: Path, models: Path) -> list[str]:
    """A command with stand-ins for its models, the recipe that it reads in place, and nothing where it writes."""
    ready = [re.sub(r"^steps=\d+$", "steps=4", _stand_in(word, models)) for word in words]
    ready = ["4" if before == "--recover-steps" else word for before, word in pairwise(["", *ready])]
    ready = ["cosine=-1" if before == "--fail-under" else word for before, word in pairwise(["", *ready])]
    written = {word for before, word in pairwise(ready) if before == "--out" or word == "EVA-CLIP-E-small/"}
    for word in written if "--layout" not in words else ():  # where a second precision joins the first
        if (here / word).is_dir():
            shutil.rmtree(here / word)
    for word in ready[1:]:
        if word.startswith(FINISHED) and word not in written and not (here / word).exists():
            made = models / word
            shutil.copytree(made if made.is_dir() else models / "small", here / word)
    if "--recipe" in ready:
        recipe = ready[ready.index("--recipe") + 1]
        known = ROOT / recipe
        text = known.read_text() if known.is_file() else blocks_of(page, "yaml")[0].code
        text = re.sub(r"^model: (\S+)", lambda match: f"model: {_stand_in(match[1], models)}", text, flags=re.M)
        (here / recipe).parent.mkdir(exist_ok=True)
        (here / recipe).write_text(text)
    return [*ready, *MORE.get(ready[0], [])]


def _stand_in(word: str, models: Path) -> str:
    if "@" in word:  # its file lies beside
        return word
    return next((str(models / folder) for start, folder in STAND_INS.items() if word.startswith(start)), word)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more worker processes than there are cores here
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
def test_the_commands_of_a_page_run(page, here, models, capsys):
    for words in runnable(page):
        code = run(prepared(words, page, here, models))
        assert code == 0, f"{name(page)}: vitrim {' '.join(words)}: {capsys.readouterr().err}"
