"""Streamed least squares against the solution on all rows at once; stitching layers."""

import pytest
import torch

from stitched_llama.layers import Fit, LeastSquares, Residual, StitchingLayer


def rows(count, width, seed=0, offset=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def direct(x, y, weights=None):
    """Weight [out, in] and bias [out] by torch's own solver on all rows, bias as a column of ones."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    scale = 1.0 if weights is None else weights.sqrt()[:, None]
    solution = torch.linalg.lstsq(x * scale, y * scale).solution
    return solution[:-1].T, solution[-1]


def streamed(*batches, ridge=0.0):
    squares = LeastSquares(batches[0][0].shape[1], batches[0][1].shape[1])
    for batch in batches:
        squares.add(*batch)
    fit = squares.solve(ridge)
    return fit.weight, fit.bias


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_streamed_equals_all_rows_at_once(offset, ridge):
    x, y = rows(90, 6, 1, offset), rows(90, 4, 2, -offset)
    batches = [(x[i : i + 17], y[i : i + 17]) for i in range(0, 90, 17)]
    for found, wanted in zip(streamed(*batches, ridge=ridge), direct(x, y)):
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)


def test_a_known_affine_map_is_found():
    weight, bias, x = rows(4, 6, 3), rows(1, 4, 4)[0], rows(50, 6, 5)
    found_weight, found_bias = streamed((x, x @ weight.T + bias))
    torch.testing.assert_close(found_weight, weight)
    torch.testing.assert_close(found_bias, bias)


def test_several_junctions_minimise_the_sum_of_their_residuals():
    one, other = (rows(40, 5, 6), rows(40, 3, 7)), (rows(70, 5, 8, 2.0), rows(70, 3, 9))
    joint = direct(torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]))
    for found, wanted in zip(streamed(one, other), joint):
        torch.testing.assert_close(found, wanted)


def test_weights_scale_squared_residuals():
    x, y, weights = rows(60, 4, 10), rows(60, 3, 11), rows(60, 1, 12)[:, 0].exp()
    for found, wanted in zip(streamed((x, y, weights)), direct(x, y, weights)):
        torch.testing.assert_close(found, wanted)
    doubled = (torch.cat([x, x[:20]]), torch.cat([y, y[:20]]))
    twice = torch.ones(60, dtype=torch.float64)
    twice[:20] = 2
    for found, wanted in zip(streamed((x, y, twice)), direct(*doubled)):
        torch.testing.assert_close(found, wanted)


def test_ridge_is_relative_to_the_features():
    x, y = rows(80, 5, 13), rows(80, 2, 14)
    (weight, bias), (scaled, scaled_bias) = streamed((x, y), ridge=0.1), streamed((x * 1000, y), ridge=0.1)
    torch.testing.assert_close(weight, scaled * 1000)
    torch.testing.assert_close(bias, scaled_bias)
    assert weight.norm() < streamed((x, y))[0].norm()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    penalty = 0.1 * covariance.diagonal().mean() * torch.eye(5, dtype=x.dtype)
    torch.testing.assert_close(weight, torch.linalg.solve(covariance + penalty, centred.T @ y / len(x)).T)


def test_fewer_rows_than_features_and_constant_features_stay_finite():
    for x in (rows(3, 8, 15), torch.ones(20, 8, dtype=torch.float64), torch.zeros(20, 8, dtype=torch.float64)):
        weight, bias = streamed((x, rows(len(x), 2, 16)), ridge=1e-4)
        assert weight.isfinite().all()
        assert bias.isfinite().all()


def test_half_precision_rows_are_summed_in_double():
    x = torch.full((4096, 1), 3.0, dtype=torch.bfloat16)
    x[::2] = 1.0
    weight, bias = streamed((x, 2 * x))
    assert float(weight) == pytest.approx(2)
    assert float(bias) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_are_refused(side, value):
    batch = (rows(9, 2, 17), rows(9, 2, 18))
    batch[side][4, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        streamed(batch, ridge=1e-4)


def test_rows_that_do_not_belong_together_and_no_rows_are_refused():
    with pytest.raises(ValueError, match="9 rows of X against 8 of Y"):
        LeastSquares(2, 2).add(rows(9, 2), rows(8, 2))
    with pytest.raises(ValueError, match="no activations"):
        LeastSquares(2, 2).solve()


def test_streamed_r2_equals_the_definition():
    target, predicted = rows(50, 3, 19, 5.0), rows(50, 3, 20, 5.0)
    residual = Residual()
    for start in range(0, 50, 7):
        residual.add(predicted[start : start + 7].float(), target[start : start + 7].float())
    spread = (target - target.mean(0)).square().sum()
    assert residual.r2 == pytest.approx(float(1 - (target - predicted).square().sum() / spread), rel=1e-5)
    perfect = Residual()
    perfect.add(target, target)
    assert perfect.r2 == 1.0
    assert Residual().r2 != Residual().r2


def test_stitching_layer_starts():
    layer = StitchingLayer(6, 9)
    x = rows(5, 6).float()
    layer.init_identity()
    torch.testing.assert_close(layer(x), torch.cat([x, torch.zeros(5, 3)], 1))
    weight, bias = rows(9, 6, 1), rows(1, 9, 2)[0]
    layer.init_solution(Fit(weight, bias))
    torch.testing.assert_close(layer(x), (x.double() @ weight.T + bias).float())
    wide = StitchingLayer(4000, 50)
    wide.init_kaiming(torch.Generator().manual_seed(0))
    assert float(wide.core.weight.detach().std()) == pytest.approx(4000**-0.5, rel=0.02)
    assert not wide.core.bias.any()


def test_stitching_layer_brings_activations_to_its_own_dtype():
    assert StitchingLayer(4, 4, dtype=torch.bfloat16)(torch.zeros(2, 4)).dtype == torch.bfloat16


def test_without_a_ridge_features_that_depend_on_each_other_have_the_least_solution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 63, dtype=torch.float64, generator=generator)
    x = torch.cat([x, x[:, :1]], 1)  # the last feature repeats the first
    y = x @ torch.randn(64, 5, dtype=torch.float64, generator=generator) + 1
    weight, bias = streamed((x, y))
    torch.testing.assert_close(x @ weight.T + bias, y, atol=1e-8, rtol=0)
    torch.testing.assert_close(weight[:, 0], weight[:, -1], atol=1e-8, rtol=0)
