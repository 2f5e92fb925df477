"""lsh_hash against the reference: the same bits wherever a product is not too near zero to tell."""

import lsh_reference
import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, array

from attnspan.planner.errors import UserError
from attnspan.planner.lsh import projection
from attnspan.plugins.trt_sparse_attn.kernels import lsh_hash

SHAPES = [{"bits": k, "tables": count} for k, count in ((1, 1), (10, 30), (15, 9))] + [{"signature_bits": n} for n in (64, 256)]


def unpacked(codes: torch.Tensor, width: int) -> np.ndarray:
    """Bits of codes, the least significant first. [..., codes * width]"""
    words = codes.cpu().numpy().astype(np.int64)
    return (words[..., None] >> np.arange(width) & 1).reshape(*codes.shape[:-1], -1).astype(bool)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (80, torch.float16), (128, torch.bfloat16)])
def test_bits_are_the_signs_of_products(kind: dict[str, int], dim: int, dtype: torch.dtype) -> None:
    heads = 3
    width = kind.get("bits", 32)
    matrix = projection(dim, kind.get("signature_bits") or width * kind["tables"], 5)
    random = np.random.default_rng(0)
    x = torch.tensor(random.standard_normal((2, 23, heads * dim)) + 1, dtype=dtype, device=DEVICE)
    mean = torch.tensor(random.standard_normal((2, heads, dim)) / 4 + 1, dtype=torch.float32, device=DEVICE)
    for centre, shift in ((None, 0), (mean, array(mean)[:, None]), (mean[0].contiguous(), array(mean[0]))):
        codes = lsh_hash(x, torch.from_numpy(matrix).to(DEVICE), num_heads=heads, mean=centre, **kind)
        assert codes.dtype == (torch.int16 if "bits" in kind else torch.int32)
        vectors = (array(x).reshape(2, 23, heads, dim) - shift).astype(np.float32)
        exact = torch.from_numpy(vectors).bfloat16().double().numpy() @ matrix.astype(np.float64)
        clear = np.abs(exact) > 1e-4
        assert clear.mean() > 0.99
        want = lsh_reference.signs(vectors, matrix)
        assert np.array_equal(unpacked(codes, width)[clear], want[clear])


def test_a_vector_without_length_has_no_bit_set() -> None:
    x = torch.zeros(1, 2, 64, dtype=torch.float16, device=DEVICE)
    codes = lsh_hash(x, torch.from_numpy(projection(64, 128, 0)).to(DEVICE), num_heads=1, signature_bits=128)
    assert codes.shape == (1, 2, 1, 4)
    assert not codes.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 16, "tables": 4}, "bits is 16, tables 4: must be 1 to 15"),
        ({"bits": 4}, "tables None"),
        ({"signature_bits": 96}, "signature_bits is 96: must be one of 64, 128, 256"),
        ({"signature_bits": 64, "bits": 3}, "must be left out"),
        ({"signature_bits": 128}, r"projection has shape \[64, 64\]: must be \[64, 128\]"),
        ({"signature_bits": 64, "num_heads": 4}, "head_dim is 32: must be one of 64, 80"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    x = torch.zeros(1, 2, 128, dtype=torch.float16, device=DEVICE)
    with pytest.raises(UserError, match=message):
        lsh_hash(x, torch.zeros(64, 64, device=DEVICE), **{"num_heads": 2, **change})
