"""Attention stays in float32 where bf16 costs more than it saves, and nothing else is touched."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from vitrim.distributed.precision import attention_in_float32

CPU = torch.device("cpu")


def attend(*, enabled=True, device=CPU, grad=True, autocast=True, mask=None):
    """Attention with queries from a linear layer, in what precision it ran, and the gradient of its input."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 8, generator=generator).requires_grad_(grad)
    weight = torch.randn(8, 8, generator=generator)
    with attention_in_float32(device, enabled=enabled):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            query = linear(tokens, weight)
            output = scaled_dot_product_attention(query, query, query, attn_mask=mask, scale=0.3)
        if grad:
            output.float().square().sum().backward()
    return query, output, tokens.grad


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril().bool(), torch.randn(5, 5)])
def test_attention_that_is_trained_runs_in_float32_on_what_bf16_gave(mask):
    query, output, grad = attend(mask=mask)
    assert query.dtype == torch.bfloat16 and output.dtype == torch.float32
    expected = scaled_dot_product_attention(*[query.detach().float()] * 3, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(output.detach(), expected)
    _, _, exact = attend(autocast=False, mask=mask)
    torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("given", [{"enabled": False}, {"device": torch.device("meta")}, {"grad": False}])
def test_elsewhere_nothing_changes(given):
    _, output, _ = attend(**given)
    assert output.dtype == torch.bfloat16


def test_without_autocast_nothing_changes():
    _, output, grad = attend(autocast=False)
    _, plain, expected = attend(autocast=False, enabled=False)
    assert torch.equal(output, plain) and torch.equal(grad, expected)
