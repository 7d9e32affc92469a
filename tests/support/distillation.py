"""A tiny teacher, a student of half its width, images, and recovery of the one by the other."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch

from vitrim.config.options import AtOnceOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, open_images
from vitrim.models.sites import find_mlps
from vitrim.recover.at_once import train_at_once_
from vitrim.recover.distill import recover_
from vitrim.recover.losses import feature_loss
from vitrim.surgery import KeepUnits, apply_


def make_teacher() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
    )
    return model.eval()


def make_student(teacher: torch.nn.Module, width: int = 16) -> torch.nn.Module:
    student = copy.deepcopy(teacher)
    apply_(student, [KeepUnits(site=site, keep=tuple(range(width))) for site in find_mlps(student)])
    return student


def make_images(num_images: int = 48) -> ImageSet:
    images = torch.randn(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return open_images([(image, index % 3) for index, image in enumerate(images)])


HELD_OUT = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))]


def run(student, teacher, *, work=None, resume=False, **kwargs):
    options = RecoverOptions(
        **{"steps": 6, "batch_size": 8, "lr": 1e-3, "num_validations": 3, **kwargs.pop("options", {})}
    )
    images = kwargs.pop("images", None) or make_images()
    context = RunContext(work=work, resume=resume, quiet=True)
    return recover_(student, teacher, images, held_out=HELD_OUT, options=options, context=context, **kwargs)


def train(student, teacher, *, work=None, resume=False, images=None, **values):
    """Train all blocks at once."""
    options = AtOnceOptions(**{"steps": 12, "batch_size": 8, "num_validations": 6, "lr": 0.01, **values})
    context = RunContext(work=work, resume=resume, quiet=True)
    return train_at_once_(
        student, teacher, images or make_images(), held_out=HELD_OUT, options=options, context=context
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Broken(torch.utils.data.Dataset):
    """Images of which some can't be read."""

    def __init__(self, num_images: int, bad: set[int]) -> None:
        self.images, self.bad, self.asked = make_images(num_images), bad, set()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked.add(index)
        if index in self.bad:
            raise OSError("broken")
        return self.images[index][0]


@contextmanager
def stopped_at(kind: type, step: int, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Send this process a signal when a run of a class is about to be judged at a step."""
    real = kind.validate

    def stop(run, loss):
        if run.step == step:
            os.kill(os.getpid(), number)
        return real(run, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "validate", stop)
        yield


def poison(monkeypatch, at, value=float("nan")):
    """Make the loss of some training steps (counted over the whole process) no number, or huge."""
    from vitrim.recover import run as module

    seen = {"steps": 0}

    def bad(student, teacher):
        loss = feature_loss(student, teacher)
        seen["steps"] += int(torch.is_grad_enabled() and loss.requires_grad)
        return loss * value if seen["steps"] - 1 in at else loss  # the first is the probe for trainable parameters

    monkeypatch.setattr(module, "feature_loss", bad)


EPOCH = {"steps": 18, "num_validations": 9}  # three epochs of 48 images


def counted(teacher):
    """A teacher that counts the images it is shown."""
    seen = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return teacher, seen
