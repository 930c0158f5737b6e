import itertools

import pytest
import torch
import torch.nn.functional as F

from cpq_lightning.functional.attention import attention

PLAIN = [lambda x: x] * 4


def _qkv(heads=4, kv_heads=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 6)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def _masks():
    added = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"none": None, "added": added, "boolean": added > -1, "per head": added.expand(2, 4, 5, 7) * 2}


@pytest.mark.parametrize(("mask", "scale"), itertools.product(_masks(), (None, 0.3)))
def test_it_is_torchs_attention(mask, scale):
    q, k, v = _qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=_masks()[mask], scale=scale)
    torch.testing.assert_close(attention(q, k, v, _masks()[mask], scale=scale, operands=PLAIN), expected)


def test_causal_and_grouped_heads_are_torchs():
    q, k, v = _qkv(kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    actual = attention(q, k, v, is_causal=True, enable_gqa=True, operands=PLAIN)
    torch.testing.assert_close(actual, expected)


def test_dropout_drops_attention_weights():
    q, k, v = _qkv()
    torch.manual_seed(0)
    seen = []
    attention(q, k, v, dropout_p=0.5, operands=[*PLAIN[:2], lambda w: seen.append(w) or w, PLAIN[3]])
    assert 0.3 < (seen[0] == 0).double().mean() < 0.7


def test_each_operand_passes_its_function():
    q, k, v = _qkv()
    seen = []
    operands = [lambda x, i=i: seen.append((i, tuple(x.shape))) or x for i in range(4)]
    attention(q, k, v, operands=operands)
    assert sorted(seen) == [(0, (2, 4, 5, 8)), (1, (2, 4, 7, 8)), (2, (2, 4, 5, 7)), (3, (2, 4, 7, 6))]


def test_two_masks_are_refused():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="exclude each other"):
        attention(q, k, v, _masks()["added"], is_causal=True, operands=PLAIN)


def test_a_query_that_sees_no_key_attends_to_nothing():
    q, k, v = _qkv()
    hidden = torch.ones(5, 7, dtype=torch.bool)
    hidden[2] = False
    for mask in (hidden, torch.zeros(5, 7).double().masked_fill(~hidden, -torch.inf)):
        actual = attention(q, k, v, mask, operands=PLAIN)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        assert not actual[:, :, 2].any()


def test_a_mask_of_another_type_is_taken():
    q, k, v = _qkv(dtype=torch.bfloat16)
    mask = torch.randn(5, 7)
    actual = attention(q, k, v, mask, operands=PLAIN)
    assert actual.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
