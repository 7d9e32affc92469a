"""Small models of timm for tests of their files."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def made(seed: int = 0, **arguments: Any) -> nn.Module:
    """A small model with random values everywhere."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", **arguments).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Check that two models have equal tensors under equal names."""
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def one_line(caught: Any) -> str:
    """The message of a caught error, which is one line."""
    assert "\n" not in str(caught.value)
    return str(caught.value)
