"Spectra of factored matrices against torch.linalg.svd of the full product in float64."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spectral_nb.attention import spectra as sp


def factors(seed, m, n, r, batch=(), rank=None, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*batch, k, r, generator=draw, dtype=torch.float64) for k in (m, n))
    if rank is not None:
        left = left[..., :rank] @ torch.randn(*batch, rank, r, generator=draw, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.sampled_from([(), (3,), (2, 2)])
)
def test_equals_the_svd_of_the_product(seed, m, n, r, batch):
    left, right = factors(seed, m, n, r, batch)
    k = min(m, n, r)
    U, S, Vh = sp.factored_svd(left, right)
    product = left @ right.mT
    assert U.shape == (*batch, m, k) and S.shape == (*batch, k) and Vh.shape == (*batch, k, n)
    assert_close(S, torch.linalg.svdvals(product)[..., :k], atol=1e-10, rtol=1e-9)
    assert_close((U * S.unsqueeze(-2)) @ Vh, product, atol=1e-9, rtol=1e-9)
    eye = torch.eye(k, dtype=torch.float64).expand(*batch, k, k)
    assert_close(U.mT @ U, eye, atol=1e-10, rtol=0)
    assert_close(Vh @ Vh.mT, eye, atol=1e-10, rtol=0)
    assert_close(sp.factored_singular_values(left, right), S, atol=1e-9, rtol=1e-9)
    assert_close(sp.spectral_norm(left, right), S[..., 0], atol=1e-9, rtol=1e-9)
    assert_close(sp.frobenius_norm(left, right), product.norm(dim=(-2, -1)), atol=1e-9, rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 5))
def test_signs_depend_on_the_product_alone(seed, rank_extra, scale):
    left, right = factors(seed, 9, 8, 4)
    mix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + scale * torch.eye(
        4
    )
    U, S, Vh = sp.factored_svd(left, right)
    if (S[:-1] / S[1:]).min() < 1.001 or torch.linalg.cond(mix) > 1e4:
        return  # nearly repeated values leave the vectors free
    U2, S2, Vh2 = sp.factored_svd(left @ mix, right @ torch.linalg.inv(mix).mT, tolerance=1e-9)
    assert_close(S2, S, atol=1e-8, rtol=1e-6)
    assert_close(U2, U, atol=1e-5, rtol=0)
    assert_close(Vh2, Vh, atol=1e-5, rtol=0)
    assert (sp.canonical_signs(U) == 1).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_factors(rank):
    left, right = factors(1, 10, 9, 5, (4,), rank=max(rank, 1))
    left = left * (rank > 0)
    U, S, Vh = sp.factored_svd(left, right)
    assert (S[..., rank:] < 1e-12 * max(1.0, float(S.max()))).all()
    assert_close(U.mT @ U, torch.eye(5, dtype=torch.float64).expand(4, 5, 5), atol=1e-10, rtol=0)
    assert_close((U * S.unsqueeze(-2)) @ Vh, left @ right.mT, atol=1e-10, rtol=0)
    assert (sp.factored_singular_values(left, right)[..., rank:] < 1e-10 * max(1.0, float(S.max()))).all()


def test_repeated_values_rebuild_and_keep_their_signs():
    left, right = torch.eye(6, 4), torch.eye(5, 4)
    first, again = sp.factored_svd(left, right), sp.factored_svd(left.clone(), right.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    U, S, Vh = first
    assert_close(S, torch.ones(4))
    assert_close(U @ Vh, left @ right.mT)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-6, 1e6, 1e17])
def test_scale_does_not_matter(magnitude):
    left, right = factors(3, 20, 30, 4, dtype=torch.float32)
    S = sp.factored_singular_values(left, right)
    assert_close(sp.factored_singular_values(left * magnitude, right) / magnitude, S, rtol=1e-4, atol=0)
    assert_close(sp.factored_svd(left * magnitude, right)[1] / magnitude, S, rtol=1e-4, atol=0)
    assert_close(sp.participation_ratio(left * magnitude), sp.participation_ratio(left), rtol=1e-6, atol=0)


def test_small_values_keep_their_digits_in_double_precision():
    q = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64)).Q
    wanted = torch.tensor([1.0, 1e-4, 1e-8, 1e-11], dtype=torch.float64)
    left = (q * wanted).float()
    assert_close(
        sp.factored_singular_values(left, q, dtype=torch.float64),
        torch.linalg.svdvals(left.double()),
        rtol=1e-3,
        atol=1e-15,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    left, right = factors(0, 6, 6, 2, dtype=dtype)
    U, S, Vh = sp.factored_svd(left, right)
    assert S.dtype == torch.float32
    assert_close(S, torch.linalg.svdvals(left.float() @ right.float().mT)[:2], rtol=1e-4, atol=1e-4)
    assert sp.factored_svd(left, right, dtype=torch.float64)[1].dtype == torch.float64


def test_numpy_and_broadcast_batches():
    left, right = factors(0, 6, 5, 2, (3,))
    U, S, Vh = sp.factored_svd(left.numpy(), right[0].numpy())
    assert_close(S, torch.linalg.svdvals(left @ right[0].mT)[..., :2], atol=1e-10, rtol=1e-9)
    assert sp.participation_ratio(np.eye(3)).item() == pytest.approx(3)


def test_participation_ratio_from_gram_summed_over_batches():
    x = torch.randn(200, 12, dtype=torch.float64) * torch.linspace(1, 0.01, 12, dtype=torch.float64)
    gram = sum(part.mT @ part for part in x.split(37))
    for kind in sp.PR_KINDS:
        assert_close(sp.participation_ratio_from_gram(gram, kind), sp.participation_ratio(x, kind), rtol=1e-9, atol=0)
    s = torch.linalg.svdvals(x)
    p = s**2 / (s**2).sum()
    assert_close(sp.participation_ratio(x), (-(p * p.log()).sum()).exp(), rtol=1e-9, atol=0)
    assert_close(sp.participation_ratio(x, "inverse"), 1 / (p**2).sum(), rtol=1e-9, atol=0)
    assert_close(sp.participation_ratio(x, "amplitude"), s.sum() ** 2 / (s**2).sum(), rtol=1e-9, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 9), st.integers(1, 9), st.sampled_from(sp.PR_KINDS))
def test_participation_ratio_is_between_one_and_the_rank(seed, n, d, kind):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    pr = sp.participation_ratio(x, kind).item()
    assert 1 - 1e-9 <= pr <= min(n, d) * (1 + 1e-9)
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    assert sp.participation_ratio(7 * x.double() @ q, kind).item() == pytest.approx(pr, rel=1e-5)


def test_zero_matrices_have_no_direction():
    assert sp.participation_ratio(torch.zeros(2, 5, 3)).tolist() == [0, 0]
    assert sp.stable_rank(torch.zeros(3, 2), torch.zeros(4, 2)).item() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 4))
def test_principal_angles_match_the_definition(seed, k, m):
    draw = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(9, k, generator=draw, dtype=torch.float64),
        torch.randn(9, m, generator=draw, dtype=torch.float64),
    )
    qa, qb = torch.linalg.qr(a).Q, torch.linalg.qr(b).Q
    cosines = torch.linalg.svdvals(qa.mT @ qb)
    assert_close(sp.principal_angles(a, b).cos(), cosines, atol=1e-9, rtol=0)
    assert_close(sp.subspace_overlap(a, b), (qa.mT @ qb).square().sum() / min(k, m), atol=1e-9, rtol=0)
    assert_close(sp.subspace_overlap(a, b), sp.subspace_overlap(b, a), atol=1e-9, rtol=0)


def test_small_angles_keep_their_digits():
    tilted = torch.tensor([[math.cos(1e-9)], [math.sin(1e-9)]], dtype=torch.float64)
    assert sp.principal_angles(torch.eye(2, 1), tilted).item() == pytest.approx(1e-9, rel=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sp.factored_svd(torch.ones(3), torch.ones(3, 1)), "left has shape"),
        (lambda: sp.factored_svd(torch.ones(3, 2), torch.ones(3, 1)), "differ in their last axis"),
        (lambda: sp.factored_svd(torch.ones(2, 3, 1), torch.ones(3, 3, 1)), "batch axes"),
        (
            lambda: sp.factored_svd(torch.ones(3, 1), torch.full((3, 1), float("inf"))),
            "right has values that are not finite",
        ),
        (lambda: sp.factored_svd(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)), "dtype torch.int64"),
        (lambda: sp.factored_svd(torch.ones(3, 0), torch.ones(3, 0)), "empty matrix"),
        (lambda: sp.participation_ratio(torch.eye(2), "shannon"), "allowed: entropy"),
        (lambda: sp.participation_ratio_from_gram(torch.ones(2, 3)), "square"),
        (lambda: sp.participation_ratio_from_gram(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), "not symmetric"),
        (lambda: sp.participation_ratio_from_gram(-torch.eye(2)), "negative eigenvalue"),
        (lambda: sp.subspace_overlap(torch.ones(4, 2), torch.eye(4)), "a has dependent columns"),
        (lambda: sp.principal_angles(torch.eye(4, 1), torch.eye(5, 1)), "different dimensions"),
        (lambda: sp.principal_angles(torch.ones(2, 3), torch.eye(2)), "cannot be independent"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_factor_fails_loudly():
    left, right = factors(0, 8, 8, 3, (4,))
    U, S, Vh = sp.factored_svd(left, right)
    U = U.clone()
    U[2, :, 1] *= 1.01
    with pytest.raises(ArithmeticError, match=r"matrix \(2,\)"):
        sp.check_reconstruction(left, right, U, S, Vh)
    S = S.clone()
    S[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match=r"matrix \(0,\)"):
        sp.check_reconstruction(left, right, *sp.factored_svd(left, right)[:1], S, Vh)
