"""eval.py's metrics, on codes whose score is known, and its command line, on a run of one step."""

import io
import json
import math
import os
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation  # not the builtin
import gen_circles
import sbvae

SIZES = (8, 12)  # classes of two factors x and y


def classes_of(n=20_000, sizes=SIZES, seed=0):
    return np.stack([np.random.default_rng(seed + f).integers(0, s, n) for f, s in enumerate(sizes)], 1)


def perfect(classes, sizes=SIZES):
    """Codes of about unit variance, one for each factor."""
    return (3.4 * ((classes + 0.5) / np.array(sizes) - 0.5)).astype(np.float32)


def rotated(classes):
    x, y = perfect(classes).T
    return np.stack([x + y, x - y], 1)


def uninformative(classes):
    return np.random.default_rng(9).standard_normal((len(classes), 3)).astype(np.float32)


CODES = {
    "perfect": perfect,
    "perfect, latents permuted, scaled, turned and shifted": lambda c: perfect(c)[:, ::-1] * np.float32([-7, 0.5]) + 4,
    "perfect, and an idle latent": lambda c: np.column_stack([perfect(c), uninformative(c)[:, 0]]),
    "perfect, and a constant": lambda c: np.column_stack([perfect(c), np.full(len(c), 0.3, np.float32)]),
    "rotated by 45 degrees": rotated,
    "duplicated": lambda c: np.column_stack([perfect(c), perfect(c)]),
    "one factor": lambda c: perfect(c)[:, :1],
    "uninformative": uninformative,
    "constant": lambda c: np.full((len(c), 4), 0.3, np.float32),
}
# MIG, then the FactorVAE metric. With two factors guessing is right in one half. Rotated, both latents vary alike.
SCORES = {name: (1.0, 1.0) for name in CODES if name.startswith("perfect")} | {
    "rotated by 45 degrees": (0.0, 0.5),
    "duplicated": (0.0, 1.0),
    "one factor": (0.5, 0.5),  # its single latent is always the one that varies least
    "uninformative": (0.0, 0.5),
    "constant": (0.0, 0.0),
}


# ------------------------------------------------------------------------------------------ mutual information


def slow_information(code, factor, bins):
    """Literally: count pairs in dictionaries, over the histogram's bins found by comparing."""
    edges = np.histogram(code, bins)[1][:-1]
    pairs, cells, classes = {}, {}, {}
    for value, label in zip(code, factor, strict=True):
        cell = sum(1 for edge in edges if value >= edge)
        for counts, key in ((pairs, (cell, label)), (cells, cell), (classes, label)):
            counts[key] = counts.get(key, 0) + 1
    n = len(code)
    return sum(m / n * math.log(m * n / (cells[cell] * classes[label])) for (cell, label), m in pairs.items())


def slow_mig(codes, factors, bins):
    """As disentanglement_lib defines it: the entropy of a factor is its information about itself."""
    gaps = []
    for factor in factors.T:
        known = sorted(slow_information(code, factor, bins) for code in codes.T)
        counts = [int((factor == label).sum()) for label in set(factor.tolist())]
        gaps.append((known[-1] - known[-2]) / -sum(m / len(factor) * math.log(m / len(factor)) for m in counts))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [20, 7])
def test_mig_equals_a_literal_transcription(dtype, bins):
    factors = np.column_stack([classes_of(700, (5, 40)), np.round(np.linspace(-1, 1, 700), 1)])
    noise = np.random.default_rng(1).standard_normal((700, 4))
    codes = (noise + factors[:, [0, 1, 1, 2]] * [0.5, 0.05, 0.1, 2]).astype(dtype)
    information = evaluation.mutual_information(codes, factors, bins)
    expected = [[slow_information(code, factor, bins) for factor in factors.T] for code in codes.T]
    np.testing.assert_allclose(information, expected, atol=1e-9)
    assert evaluation.mig(codes, factors, bins) == pytest.approx(slow_mig(codes, factors, bins), abs=1e-9)
    assert evaluation.mig(torch.from_numpy(codes), torch.from_numpy(factors), bins) == evaluation.mig(
        codes, factors, bins)
    assert evaluation.mig(codes, factors, bins + 1) != pytest.approx(slow_mig(codes, factors, bins), abs=1e-4)


def test_a_value_on_an_edge_belongs_to_the_bin_above_and_the_largest_to_the_last():
    values = np.arange(21.0)[:, None]  # the edges of 20 bins are 0, 1, ..., 20: only 19 and 20 share a bin
    information = evaluation.mutual_information(values, values)
    assert information.item() == pytest.approx(math.log(21) - 2 / 21 * math.log(2), abs=1e-12)


def test_what_is_independent_is_overestimated_by_as_much_as_the_docstring_says():
    n, sizes = 10_000, (40, 40, 40, 40, 40)
    codes = np.random.default_rng(0).uniform(size=(n, 8))
    information = evaluation.mutual_information(codes, classes_of(n, sizes))
    assert information.mean() == pytest.approx(19 * 39 / (2 * n), rel=0.05)


@pytest.mark.parametrize("name", CODES)
def test_mig_of_codes_with_a_known_answer(name):
    factors = classes_of()
    assert evaluation.mig(CODES[name](factors), factors) == pytest.approx(SCORES[name][0], abs=0.01)


def test_mig_does_not_care_how_factors_and_latents_are_called():
    factors = classes_of(3000)
    codes = perfect(factors) + 0.7 * uninformative(factors)[:, :2]
    score = evaluation.mig(codes, factors)
    assert 0.1 < score < 0.9
    names = np.random.default_rng(0).permutation(100) - 50.0
    assert evaluation.mig(codes[:, ::-1], names[factors]) == pytest.approx(score, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(factors))
    assert evaluation.mig(codes[order], factors[order]) == pytest.approx(score, abs=1e-12)
    assert evaluation.mig(codes, factors[order]) < 0.01  # of other images


def test_codes_and_factors_are_not_to_be_swapped():
    factors = classes_of(3000)
    codes = CODES["perfect, and an idle latent"](factors)
    assert evaluation.mig(codes, factors) == pytest.approx(1, abs=0.02)
    assert evaluation.mig(factors, codes) < 0.75


def test_constants_give_no_nan():
    factors = classes_of(3000)
    fixed = np.column_stack([factors, np.zeros(3000, int)])  # a factor of one class is left out
    score = evaluation.mig(perfect(factors), factors)
    assert evaluation.mig(perfect(factors), fixed) == pytest.approx(score, abs=1e-12) and score > 0.98
    assert evaluation.mig(perfect(factors), np.zeros((3000, 2), int)) == 0
    assert evaluation.mig(perfect(factors)[:1], factors[:1]) == 0
    narrow = np.float32(0.3) + np.float32(3e-8) * (factors % 2).astype(np.float32)  # 2 floats hold no 20 bins
    assert len(np.unique(narrow)) == 2
    assert evaluation.mig(narrow, factors) == 0
    assert evaluation.mig_sampled(*[np.zeros((3000, 2), np.float32)] * 2, factors) == pytest.approx(0, abs=1e-6)
    assert evaluation.mig_sampled(*[np.zeros((3000, 2), np.float32)] * 2, fixed[:, 2:]) == 0


@pytest.mark.parametrize("codes, factors, message", [
    (np.zeros((5, 2)), np.zeros((4, 2)), "codes must be"),
    (np.zeros(5), np.zeros((5, 2)), "codes must be"),
    (np.zeros((5, 2)), np.zeros(5), "codes must be"),
    (np.zeros((0, 2)), np.zeros((0, 2)), "codes must be"),
    (np.full((5, 2), np.nan), np.zeros((5, 2)), "not finite"),
])
def test_bad_codes_are_refused(codes, factors, message):
    for metric in (evaluation.mig, evaluation.mutual_information, lambda c, f: evaluation.mig_sampled(c, c, f)):
        with pytest.raises(ValueError, match=message):
            metric(codes, factors)


# ----------------------------------------------------------------------------------------- sampled information


def integrals(means, sigma, reach):
    """A factor of equal classes c; images with posteriors N(m, sigma^2), m uniform within means[c] +- reach: I(z;
    class), and d(z | class), d(z) of the docstring, by quadrature in float64."""
    z = torch.linspace(min(means) - reach - 9 * sigma, max(means) + reach + 9 * sigma, 100_001, dtype=torch.float64)
    step = (z[1] - z[0]).item()

    def smeared(m, s):  # N(z; m', s^2), averaged over m' within m +- reach
        return (torch.erf((z - m + reach) / s / 2**0.5) - torch.erf((z - m - reach) / s / 2**0.5)) / (4 * reach)

    given = torch.stack([smeared(m, sigma) for m in means])
    # The square of N(m, sigma^2) is N(m, sigma^2 / 2) / (2 sigma sqrt(pi))
    squares = torch.stack([smeared(m, sigma / 2**0.5) for m in means]) / (2 * sigma * math.pi**0.5)
    marginal, some = given.mean(0), given > 1e-100
    information = torch.where(some, given * (given / marginal).log(), 0).sum(1).mean() * step
    within = torch.where(some, squares / given, 0).sum(1).mean() * step - 1
    overall = torch.where(marginal > 1e-100, squares.mean(0) / marginal, 0).sum() * step - 1
    return information.item(), within.item(), overall.item()


def posteriors(n, means, sigma, reach, seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(means), n)
    mu = np.array(means)[classes] + rng.uniform(-reach, reach, n)
    return mu[:, None].astype(np.float32), np.full((n, 1), 2 * math.log(sigma), np.float32), classes[:, None]


@pytest.mark.parametrize("means, sigma", [((-1, 1), 0.5), ((-1, 1), 2.0), ((0, 0.3, 1, 2), 0.4)])
def test_sampled_information_of_a_gaussian_channel(means, sigma):
    """One posterior a class: no bias to speak of, and the histogram of the means would say log(classes)."""
    mu, logvar, classes = posteriors(4000, means, sigma, 1e-6, seed=0)
    expected = integrals(means, sigma, 1e-6)[0]
    assert evaluation.sampled_information(mu, logvar, classes).item() == pytest.approx(expected, abs=0.02)
    assert evaluation.mutual_information(mu, classes).item() == pytest.approx(math.log(len(means)), abs=0.01)
    assert expected < math.log(len(means)) - 0.05
    assert evaluation.mig_sampled(mu, logvar, classes) == pytest.approx(expected / math.log(len(means)), abs=0.02)


@pytest.mark.parametrize("means, sigma, reach", [((0,) * 10, 0.1, 1.7), ((-1, -0.5, 0, 0.5, 1), 0.02, 1.2)])
def test_sampled_information_is_too_large_by_as_much_as_the_docstring_says(means, sigma, reach):
    n, (expected, within, overall) = 2000, integrals(means, sigma, reach)
    bias = (len(means) * within - overall) / (2 * n)
    assert within == pytest.approx(2 * reach / (3.5 * sigma), rel=0.1)  # what the docstring takes it for
    found = [evaluation.sampled_information(*posteriors(n, means, sigma, reach, seed), samples=1000).item() - expected
             for seed in range(16)]
    assert np.mean(found) == pytest.approx(bias, rel=0.2)
    assert np.mean(found) > 4 * np.std(found) / 4  # it can be told from 0


def test_latents_without_noise_give_no_nan():
    """--beta 0 lets sigma shrink without end, below what a float32 can hold."""
    mu, factors = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)), torch.arange(400)[:, None] % 4
    mu = mu + 3 * factors
    found = [evaluation.mig_sampled(mu, torch.full_like(mu, logvar), factors) for logvar in (-80.0, -170.0, -300.0)]
    assert found == pytest.approx([1.0] * 3, abs=1e-5)


def test_mixture_density_equals_torch_distributions_in_float64():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(2, 300, generator=generator)
    z = mu[:50] + (0.5 * logvar[:50]).exp() * torch.randn(50, generator=generator)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(300, dtype=torch.float64)),
        torch.distributions.Normal(mu.double(), (0.5 * logvar.double()).exp()))
    torch.testing.assert_close(evaluation.log_mixture(z, mu, logvar).double(), mixture.log_prob(z.double()),
                               atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["perfect", "rotated by 45 degrees", "duplicated", "uninformative"])
def test_mig_sampled_of_codes_with_a_known_answer(name):
    factors = classes_of(4000)
    codes = CODES[name](factors)
    logvar = np.full_like(codes, 2 * math.log(0.5 if name == "uninformative" else 0.01))
    assert evaluation.mig_sampled(codes, logvar, factors, samples=1000) == pytest.approx(SCORES[name][0], abs=0.03)
    vague = evaluation.mig_sampled(codes, np.zeros_like(codes), factors, samples=1000)
    assert vague < 0.6 * SCORES[name][0] + 0.03  # a posterior as wide as the codes knows little


# --------------------------------------------------------------------------------------------- FactorVAE metric


@pytest.mark.parametrize("name", CODES)
def test_factor_vae_metric_of_codes_with_a_known_answer(name):
    noise = iter(range(10**6))  # what is uninformative must differ from call to call
    represent = CODES[name]
    if "idle" in name or name == "uninformative":
        represent = lambda c: CODES[name](c) + np.float32(np.random.default_rng(next(noise)).permutation(len(c)) % 7
                                                          )[:, None] * np.array([0, 0, 1] if "idle" in name else 1)
    score = evaluation.factor_vae_metric(represent, SIZES, lambda classes: classes.numpy(), votes=400, images=2000)
    if name == "constant":
        assert score == 0
    else:
        assert score == pytest.approx(SCORES[name][1], abs=0.08 if SCORES[name][1] == 0.5 else 1e-12)


def test_factor_vae_metric_equals_a_literal_transcription():
    """From the classes that it drew: which factor was fixed can be seen, and the votes counted in loops."""
    sizes, drawn = (50, 60, 70), []

    def draw(classes):
        drawn.append(classes.clone())
        return classes

    def represent(classes):
        c = classes.double().numpy()
        noise = np.sin(1e4 * (c @ [0.3, 0.7, 0.11]))  # as good as random
        return np.column_stack([c[:, 0] + 40 * noise, 2 * c[:, 1] + c[:, 0], 1e-3 * c[:, 2], 5 * c[:, 2] + 150 * noise])

    score = evaluation.factor_vae_metric(represent, sizes, draw, votes=60, seed=3, images=1500)
    classes = torch.cat(drawn)
    assert len(classes) == 1500 + 2 * 60 * 64
    everything = represent(classes[:1500])
    variances = [float(np.var(everything[:, k], ddof=1)) for k in range(4)]
    votes = []
    for block in classes[1500:].split(64):
        fixed = [f for f in range(3) if len(set(block[:, f].tolist())) == 1]
        assert len(fixed) == 1
        codes = represent(block)
        ratios = {k: np.var(codes[:, k], ddof=1) / variances[k] for k in range(4) if math.sqrt(variances[k]) >= 0.05}
        votes.append((min(ratios, key=ratios.get), fixed[0]))
    assert sorted(ratios) == [0, 1, 3]  # the third has collapsed
    majority = {}
    for latent in range(4):
        counts = [sum(vote == (latent, f) for vote in votes[:60]) for f in range(3)]
        majority[latent] = counts.index(max(counts))
    assert score == pytest.approx(sum(majority[k] == f for k, f in votes[60:]) / 60, abs=1e-12)
    assert 0.5 < score < 1


def test_variances_are_in_units_of_the_latent():
    noisy = lambda c: (perfect(c) + 0.1 * np.sin(1e4 * c[:, ::-1] + c)) * [100, 0.3]
    arguments = dict(factor_sizes=SIZES, draw=lambda classes: classes.numpy(), votes=200, images=2000)
    assert evaluation.factor_vae_metric(noisy, **arguments) == 1


@pytest.mark.parametrize("scale, expected", [(0.04, 0.5), (0.06, 1.0)])
def test_collapsed_latents_do_not_vote(scale, expected):
    represent = lambda c: perfect(c) / perfect(classes_of()).std(0) * [scale, 1]
    score = evaluation.factor_vae_metric(represent, SIZES, lambda classes: classes.numpy(), votes=400, images=5000)
    assert score == pytest.approx(expected, abs=0.08)


def test_fresh_votes_judge():
    """60 latents of noise: by the votes it learned from the majority would be right in far more than half."""
    noise = np.random.default_rng(0)
    score = evaluation.factor_vae_metric(lambda c: noise.standard_normal((len(c), 60)), SIZES, lambda c: c, votes=60,
                                         images=500)
    assert score < 0.68


def test_a_factor_of_one_class_is_never_fixed():
    metric = lambda sizes: evaluation.factor_vae_metric(
        lambda c: c.double(), sizes, lambda c: c, votes=100, images=500)
    assert metric((9, 1, 7)) == 1
    assert metric((1, 1)) == 0


def test_factor_vae_metric_depends_on_its_seed_alone():
    arguments = dict(factor_sizes=SIZES, draw=lambda classes: classes.numpy(), votes=50, images=200)
    scores = [evaluation.factor_vae_metric(rotated, seed=seed, **arguments) for seed in (0, 0, 1, 2, 3)]
    assert scores[0] == scores[1] and len(set(scores)) > 1
    with pytest.raises(ValueError, match="not finite"):
        evaluation.factor_vae_metric(lambda c: np.full((len(c), 2), np.inf), **arguments)


# ------------------------------------------------------------------------------------------------ affine maps


def test_affine_fit_equals_the_normal_equations():
    rng = np.random.default_rng(0)
    factors, fit = rng.uniform(size=(500, 2)), rng.uniform(size=500) < 0.7
    codes = factors @ [[2, -1], [0.5, 1]] + [3, 4] + 0.2 * rng.standard_normal((500, 2))
    inputs = np.c_[np.ones(500), factors]
    solution = np.linalg.inv(inputs[fit].T @ inputs[fit]) @ inputs[fit].T @ codes[fit]
    expected = []
    for points in (fit, ~fit):
        left, mean = 0.0, codes[points].mean(0)
        for x, y in zip(inputs[points], codes[points], strict=True):
            left += sum((y - x @ solution) ** 2)
        expected.append(1 - left / sum(sum((y - mean) ** 2) for y in codes[points]))
    np.testing.assert_allclose(evaluation.affine_fit(factors, codes, fit), expected, rtol=1e-10)
    assert 0.8 < expected[0] < 0.97


def test_affine_fit_of_maps_with_a_known_answer():
    grid = np.stack(np.meshgrid(*[(np.arange(32) + 0.5) / 32] * 2), -1).reshape(-1, 2)
    middle = (abs(grid - 0.5) < 0.25).all(1)
    turned = grid @ [[1, 2], [-2, 1]] - 3
    assert evaluation.affine_fit(grid, turned) == (pytest.approx(1, abs=1e-12), None)
    assert evaluation.affine_fit(grid, turned, ~middle) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))
    folded = abs(grid - 0.5)  # no trend is left
    assert evaluation.affine_fit(grid, folded)[0] == pytest.approx(0, abs=1e-12)
    torn = np.where(middle[:, None], turned.mean(0) + 5, turned)  # right outside, wrong inside
    fitted, elsewhere = evaluation.affine_fit(grid, torn, ~middle)
    assert fitted == pytest.approx(1, abs=1e-12) and elsewhere <= 0
    assert evaluation.affine_fit(grid, np.ones_like(grid), ~middle) == (0, 0)


# --------------------------------------------------------------------------------------------- models and data


class Seer(torch.nn.Module):
    """Stands in for a VAE: latents 3 and 1 are where the light is, mapped by `see`; the others know nothing."""

    def __init__(self, see=lambda xy: xy):
        super().__init__()
        self.see, self.config = see, sbvae.Config(latents=5, likelihood="bernoulli")
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        light = images.sum(1).double() + 1e-12
        x = (light.sum(1) * torch.arange(64)).sum(1) / light.sum((1, 2)) / 64
        y = (light.sum(2) * torch.arange(64)).sum(1) / light.sum((1, 2)) / 64
        mu, logvar = torch.zeros(2, len(images), 5)
        mu[:, [3, 1]] = self.see(torch.stack([x, y], 1)).float()
        logvar[:, 3], logvar[:, 1] = -6, -5
        return mu, logvar

    def forward(self, images, generator=None):
        mu, logvar = self.encode(images)
        return sbvae.Output(torch.zeros_like(images), mu, logvar, sbvae.reparameterize(mu, logvar, generator))


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    return lambda name: gen_circles.load(name, data_dir=tmp_path_factory.mktemp("data"), num=200)


def test_geometry_of_circles(circles):
    found = evaluation.geometry(Seer(lambda xy: xy @ torch.tensor([[1.0, 1], [-1, 1]]).double()), circles("circles-xy"))
    assert found["names"] == ("x", "y") and found["shape"] == (32, 32) and found["latents"].tolist() == [3, 1]
    ends = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(found["factors"], np.array([(a, b) for a in ends for b in ends]), atol=1e-7)
    x, y = (0.2 + 0.6 * found["factors"] - 0.5 / 64).T  # Table 3; a pixel's centre is half a pixel from its edge
    np.testing.assert_allclose(found["codes"], np.stack([x - y, x + y], 1), atol=0.006)  # positions are of 1/320
    assert found["r2"] > 0.9999 and found["r2_held_out"] is None and found["blank"] is None
    assert not found["held_out"].any()
    folded = evaluation.geometry(Seer(lambda xy: (xy - 0.5).abs()), circles("circles-xy"))
    assert folded["r2"] < 0.01


@pytest.mark.parametrize("name, low, high", [
    ("circles-xy:hole-center", 0.25, 0.75), ("circles-xy:hole-corner", 0.5, 1)])
def test_geometry_of_a_hole(circles, name, low, high):
    data = circles(name)
    found = evaluation.geometry(Seer(), data)
    inside = ((found["factors"] > low) & (found["factors"] < high)).all(1)
    assert found["held_out"].tolist() == inside.tolist() and inside.sum() == 256
    assert found["r2"] > 0.9999 and found["r2_held_out"] > 0.9999
    middle = 0.2 + 0.6 * (low + high) / 2 - 0.5 / 64  # as Seer sees it

    def mirrored(xy):  # in the hole, about its centre: residuals twice as large as distances from the mean
        away = ((xy - middle).abs() < 0.3 * (high - low)).all(1, keepdim=True)
        return torch.where(away, 2 * middle - xy, xy)

    found = evaluation.geometry(Seer(mirrored), data)
    assert found["r2"] > 0.9999 and found["r2_held_out"] == pytest.approx(1 - 2**2, abs=0.01)


def test_geometry_of_other_data(circles):
    found = evaluation.geometry(Seer(), circles("circles-xh:blank"))
    assert found["names"] == ("x", "hue") and found["r2"] > 0.9999
    np.testing.assert_allclose(found["blank"], Seer().encode(torch.zeros(1, 3, 64, 64))[0][0, [3, 1]])
    found = evaluation.geometry(Seer(), circles("circles-xyh-small"), latents=[1, 3])
    assert found["names"] == ("x", "y") and found["r2"] > 0.9999 and found["latents"].tolist() == [1, 3]
    found = evaluation.geometry(Seer(), sbvae.load_dataset("sprites"))
    assert found["names"] == ("x", "y") and found["factors"].shape == (1024, 2) and found["r2"] > 0.999
    objects = types.SimpleNamespace(factor_names=("hue", "tiny", "scale"), factor_sizes=(100, 1, 4), device="cpu",
                                    draw=lambda c: torch.zeros(len(c), 1, 64, 64))
    found = evaluation.geometry(Seer(), objects, latents=[0, 1])
    assert found["names"] == ("hue", "scale") and found["shape"] == (32, 4)
    assert found["r2"] == 0
    drawn = []
    three = types.SimpleNamespace(factor_names=("a", "b", "x", "y"), factor_sizes=(5, 4, 3, 3), device="cpu",
                                  draw=lambda c: drawn.append(c) or torch.zeros(len(c), 1, 64, 64))
    assert evaluation.geometry(Seer(), three, latents=[0, 1])["names"] == ("x", "y")
    assert drawn[0].tolist() == [[2, 2, x, y] for x in range(3) for y in range(3)]  # the others in the middle
    for names, sizes, draw in [(None, None, None), (("x",), (5,), objects.draw), (("x", "y"), (5, 1), objects.draw)]:
        unknown = types.SimpleNamespace(factor_names=names, factor_sizes=sizes, draw=draw, device="cpu")
        assert evaluation.geometry(Seer(), unknown) is None


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_loss_equals_torch_distributions_in_float64(likelihood):
    config = sbvae.Config(image_shape=[1, 16, 16], latents=3, conv_layers=1, likelihood=likelihood, beta=7.0)
    model = sbvae.build_model(config).eval()
    with torch.no_grad():
        model.encoder.latents.bias[3:] = torch.tensor([-4.0, -1.3, 0.2])  # one used, one nearly, one not
    data = types.SimpleNamespace(sample=lambda n, g: torch.rand(n, 1, 16, 16, generator=g))
    found, variance = evaluation.measure_loss(model, data, samples=70, seed=5)

    generator, nll, kl, used, variances, floor = torch.Generator().manual_seed(5), [], [], [], [], []
    for n in (32, 32, 6):
        images = data.sample(n, generator)
        mu, logvar = model.encode(images)
        sigma = (0.5 * logvar.double()).exp()
        z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
        logits = model.decode(z).double()
        p = (torch.distributions.Bernoulli(logits=logits, validate_args=False) if likelihood == "bernoulli"
             else torch.distributions.Normal(logits, math.sqrt(0.3)))
        nll += (-p.log_prob(images.double()).sum((1, 2, 3))).tolist()
        exact = (torch.distributions.Bernoulli(images.double(), validate_args=False) if likelihood == "bernoulli"
                 else torch.distributions.Normal(images.double(), math.sqrt(0.3)))
        floor += (-exact.log_prob(images.double()).sum((1, 2, 3))).tolist()
        prior = torch.distributions.Normal(torch.zeros(3).double(), 1)
        kl += torch.distributions.kl_divergence(
            torch.distributions.Normal(mu.double(), sigma), prior).sum(1).tolist()
        used += (sigma < 0.5).sum(1).tolist()
        variances.append(sigma.square())
    assert np.mean(floor) < np.mean(nll)
    for key, expected in dict(nll=np.mean(nll), kl=np.mean(kl), elbo=np.mean(nll) + np.mean(kl),
                              nll_floor=np.mean(floor)).items():
        assert found[key] == pytest.approx(expected, rel=1e-5)  # at beta 7, too
    assert found["latents_used"] == pytest.approx(np.mean(used)) and 1 <= np.mean(used) <= 2
    np.testing.assert_allclose(variance, torch.cat(variances).mean(0).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("blank, ranked", [(0.5, [0, 2, 1]), (0.98, [0, 2, 1]), (1, [1, 0, 2]), (0, [0, 2, 1])])
def test_latents_are_ranked_over_images_that_show_something(blank, ranked):
    """As Figure 20's: z0 tells x where there is a circle and has the prior where there is none; z1 tells which."""
    model = sbvae.build_model(sbvae.Config(image_shape=[1, 8, 8], latents=3, conv_layers=1)).eval()
    model.encode = lambda images: (torch.zeros(len(images), 3), torch.where(
        images.flatten(1).any(1)[:, None], torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 0.25, 1])).log())

    def sample(n, generator):
        return torch.rand(n, 1, 8, 8, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) >= blank)

    found, variance = evaluation.measure_loss(model, types.SimpleNamespace(sample=sample), samples=500, seed=0)
    assert np.argsort(variance).tolist() == ranked
    np.testing.assert_allclose(variance, [0.1, 0.3, 0.2] if blank < 1 else [1, 0.25, 1], rtol=1e-6)
    assert found["latents_used"] == pytest.approx(2 * (1 - blank), abs=0.2)  # over all images
    assert evaluation.start_explorer(model, types.SimpleNamespace(sample=sample), images=200).order == ranked


def test_no_decoder_goes_below_the_floor_of_colored_sprites():
    """From the published share of pixels that are on and the law of a channel's value, V (1 - S t): over a uniform hue
    t is 0 for a third, 1 for a third and uniform in between. Integrated in float64; and by drawing."""
    u = (np.arange(400) + 0.5) / 400
    s, v = np.meshgrid(0.3 + 0.4 * u, 0.3 + 0.4 * u)
    entropy = lambda p: (-p * np.log(p) - (1 - p) * np.log1p(-p)).mean()  # noqa: E731
    ramp = np.mean([entropy(v * (1 - s * t)) for t in u])
    per_channel = (entropy(v) + entropy(v * (1 - s)) + ramp) / 3
    floor = 0.042494423521889584 * 4096 * 3 * per_channel
    assert floor == pytest.approx(evaluation.SPRITES_FLOOR, abs=0.05)
    no_colour = 0.042494423521889584 * 4096 * 3 * entropy(np.float64(0.5 * (1 - 0.5 / 2)))  # every mask, in mean gray
    assert no_colour == pytest.approx(345.4, abs=0.05)  # as results/README.md says
    images = sbvae.Sprites().sample(6000, torch.Generator().manual_seed(0)).double()
    drawn = torch.distributions.Bernoulli(images, validate_args=False).entropy().sum((1, 2, 3))
    assert abs(drawn.mean() - floor) < 4 * drawn.std() / 6000**0.5 < 10
    models = {"model": ({}, "Table 5, 3 layers"), "other": ({}, "Table 8, 1 layer")}
    jobs = [evaluation.Job(label, sbvae.Config(), 1) for label in models]
    ours = dict.fromkeys([*evaluation.COLUMNS.values(), "hours"], 1.0)
    text = evaluation.comparison(models, jobs, [ours, ours])
    assert "\n(1) An NLL below 320.4" in text and text.count("An NLL below") == 1
    assert "| paper, Table 5, 3 layers (1) |" in text and "| paper, Table 8, 1 layer (2) |" in text  # not of every row


# ------------------------------------------------------------------------------------------ runs, command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one configuration and one of another, trained for a step on a dot in 4 x 5 places."""
    folder = tmp_path_factory.mktemp("runs")
    images, factors = np.zeros((20, 16, 16), np.uint8), np.array([(x, y) for x in range(4) for y in range(5)])
    for image, (x, y) in zip(images, factors, strict=True):
        image[3 * y: 3 * y + 3, 4 * x: 4 * x + 3] = 255
    np.savez(folder / "dots.npz", images=images, factors=factors, factor_names=np.array(["x", "y"]))
    np.savez(folder / "plain.npz", images=images)
    common = dict(dataset=str(folder / "dots.npz"), steps=1, latents=3, conv_layers=1, device="cpu", precision="fp32")
    for name, other in dict(a=dict(seed=0), b=dict(seed=1), c=dict(beta=2.0),
                            d=dict(dataset=str(folder / "plain.npz"))).items():
        sbvae.train(sbvae.Config(**common | dict(out=str(folder / name)) | other))
    return folder


FAST = ["--votes", "20", "--samples", "200", "--device", "cpu"]


@pytest.fixture
def no_pictures(monkeypatch):
    drawn = []
    for module in {evaluation, sys.modules[evaluation.evaluate.__module__]}:
        monkeypatch.setattr(module, "draw_run", lambda *a: drawn.append(a))
    return drawn


def run_main(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        evaluation.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_evaluate_writes_what_it_returns(runs, no_pictures):
    metrics = evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200)
    assert json.loads((runs / "a/metrics.json").read_text()) == metrics == evaluation.read_metrics(runs / "a")
    assert [str(arguments[0]) for arguments in no_pictures] == [str(runs / "a")]
    again = evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in metrics.items() if k != "seconds"}
    other = evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200, seed=1)
    assert other["elbo"] != metrics["elbo"] and other["mig"] != metrics["mig"] and other["estimator"]["seed"] == 1

    # The same by hand, from the functions that are tested above
    model, data, step = evaluation.open_run(runs / "a", "cpu")
    assert step == metrics["step"] == 1 and not model.training
    with torch.no_grad():
        classes = torch.tensor([(x, y) for x in range(4) for y in range(5)])
        mu, logvar = model.encode(data.draw(classes))
        assert [m["variance"] for m in sorted(metrics["latents"], key=lambda m: m["index"])] == pytest.approx(
            logvar.exp().mean(0).tolist(), abs=2e-3)
        found = evaluation.affine_fit((classes + 0.5) / torch.tensor([4, 5]),
                                      mu[:, [latent["index"] for latent in metrics["latents"][:2]]])
    assert metrics["r2"] == pytest.approx(found[0], abs=1e-5) and metrics["r2_held_out"] is None
    assert metrics["estimator"] == dict(samples=200, loss_samples=100, bins=20, votes=20, vote_images=64,
                                        least_std=0.05, seed=0, loss_seed=10**9, precision="fp32")
    assert [m["variance"] for m in metrics["latents"]] == sorted(m["variance"] for m in metrics["latents"])
    assert metrics["factors"] == {"x": 4, "y": 5} and metrics["config"]["seed"] == 0


def test_a_sharp_latent_is_named_by_its_factor(runs, no_pictures, monkeypatch):
    """With an encoder that reads off column and row, all scores are 1 and the labels right."""
    opened = evaluation.open_run(runs / "a", "cpu")

    def see(images):
        rows, columns = images.sum(3)[:, 0].argmax(1) / 3, images.sum(2)[:, 0].argmax(1) / 4
        mu = torch.stack([rows - 2, torch.sin(1e3 * torch.arange(len(images))), columns - 1.5], 1).float()
        return mu, torch.tensor([-8.0, 0, -7]).expand(len(images), 3)

    monkeypatch.setattr(opened[0], "encode", see)
    monkeypatch.setattr(sys.modules[evaluation.evaluate.__module__], "open_run", lambda *a: opened)
    metrics = evaluation.evaluate(runs / "a", "cpu", votes=50, samples=300)
    assert [(m["index"], m["factor"]) for m in metrics["latents"]] == [(0, "y"), (2, "x"), (1, None)]
    assert metrics["latents"][0]["information"] == pytest.approx(math.log(5), abs=0.03)
    assert metrics["latents"][2]["information"] > 0.05 * math.log(5)  # chance alone would name it
    assert metrics["mig"] == pytest.approx(1, abs=0.1) and metrics["mig_sampled"] == pytest.approx(1, abs=0.1)
    assert metrics["factor_vae"] == 1 and metrics["r2"] == pytest.approx(1, abs=1e-6) and metrics["latents_used"] == 2

    def see_both(images):  # more nats of y, log 5, but all of x too, and there chance takes a smaller share
        mu, logvar = see(images)
        mu[:, 0] += 5 * mu[:, 2]
        return mu, logvar

    monkeypatch.setattr(opened[0], "encode", see_both)
    metrics = evaluation.evaluate(runs / "a", "cpu", votes=5, samples=300)
    assert metrics["latents"][0]["factor"] == "x" and metrics["latents"][0]["information"] == pytest.approx(
        math.log(4), abs=0.03)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_measured_on_images_that_training_has_not_drawn(seed, tmp_path, monkeypatch, no_pictures):
    """Sprites are endless, but a seed draws the same ones again."""
    drawn, sample = [], sbvae.Sprites.sample

    def spy(data, n, generator):
        images = sample(data, n, generator)
        drawn.append((n, {image.numpy().tobytes() for image in images}))
        return images

    monkeypatch.setattr(sbvae.Sprites, "sample", spy)
    monkeypatch.setattr(sbvae, "save_pictures", lambda *_: None)
    run = tmp_path / "run"
    sbvae.train(sbvae.Config(decoder="deconv", seed=seed, steps=12, log_every=12, out=str(run), device="cpu"))
    trained = set().union(*[images for n, images in drawn if n == 16])  # the others are for pictures
    assert len(trained) == 12 * 16
    drawn.clear()
    evaluation.evaluate(run, "cpu", votes=1, samples=400)
    measured = set().union(*[images for _, images in drawn])
    assert len(measured) == 200 and trained.isdisjoint(measured)


def test_reuse_needs_the_same_step_and_estimator(runs, no_pictures):
    evaluation.evaluate(runs / "b", "cpu", votes=20, samples=200)
    before = len(no_pictures)
    kept = evaluation.evaluate(runs / "b", "cpu", votes=20, samples=200, reuse=True)
    assert kept == evaluation.read_metrics(runs / "b") and len(no_pictures) == before
    evaluation.evaluate(runs / "b", "cpu", votes=21, samples=200, reuse=True)
    assert len(no_pictures) == before + 1
    path = runs / "b/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 77}))
    assert evaluation.evaluate(runs / "b", "cpu", votes=21, samples=200, reuse=True)["step"] == 1
    for damage in ("{}", "[1, 2]", '{"step": ', ""):
        path.write_text(damage)
        assert evaluation.read_metrics(runs / "b") is None
        assert evaluation.evaluate(runs / "b", "cpu", votes=21, samples=200, reuse=True)["step"] == 1


def test_the_table_of_several_runs(runs, no_pictures, capsys):
    code, out, err = run_main(capsys, runs / "a", runs / "b", runs / "c", f"{runs / 'a'}/", *FAST)  # a twice is once
    assert code == 0 and "error" not in err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert rows[0][:7] == ["run", "n", "step", "ELBO", "NLL", "NLL floor", "KL"] and "R² held out" not in rows[0]
    assert set("".join(rows[1])) == {"-"} and {len(row) for row in rows} == {len(rows[0])}
    assert [row[:3] for row in rows[2:]] == [[str(runs / "a"), "1", "1"], [str(runs / "b"), "1", "1"],
                                             [str(runs / "c"), "1", "1"],
                                             ["dots, broadcast, latents 3, conv layers 1", "2", "1"]]
    found = {name: evaluation.read_metrics(runs / name) for name in "abc"}
    mean = (found["a"]["kl"] + found["b"]["kl"]) / 2
    std = abs(found["a"]["kl"] - found["b"]["kl"]) / math.sqrt(2)
    assert rows[-1][rows[0].index("KL")] == f"{mean:.2f} ± {std:.2f}"
    assert rows[2][rows[0].index("MIG")] == f"{found['a']['mig']:.3f}"


def test_means_and_deviations_over_seeds_are_of_those_that_have_a_value():
    config, none = vars(sbvae.resolve(sbvae.Config())), dict.fromkeys(evaluation.COLUMNS.values())
    results = [none | dict(run=f"runs/{i}", config=config | dict(seed=i), step=7, elbo=elbo, mig=mig)
               for i, (elbo, mig) in enumerate([(300.0, 0.1), (310.0, 0.25), (320.0, None)])]
    assert evaluation.table(results).splitlines() == [
        "| run                | n | step | ELBO         | MIG           |",
        "| ------------------ | - | ---- | ------------ | ------------- |",
        "| runs/0             | 1 | 7    | 300.0        | 0.100         |",
        "| runs/1             | 1 | 7    | 310.0        | 0.250         |",
        "| runs/2             | 1 | 7    | 320.0        |               |",
        "| sprites, broadcast | 3 | 7    | 310.0 ± 10.0 | 0.175 ± 0.106 |",
    ]
    results = [m | dict(config=m["config"] | dict(precision=p)) for p in ("fp32", "bf16") for m in results]
    names = [line.split("|")[1].strip() for line in evaluation.table(results).splitlines()]
    assert names[-2:] == ["sprites, broadcast, fp32", "sprites, broadcast, bf16"]


def test_configurations_differ_in_what_counts(runs, no_pictures):
    a = evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200)
    same = a | {"config": a["config"] | dict(seed=9, out="elsewhere", device="cuda", log_every=3, steps=5)}
    assert evaluation.configuration(a) == evaluation.configuration(same)
    for change in (dict(beta=2.0), dict(decoder="deconv"), dict(precision="bf16")):
        assert evaluation.configuration(a) != evaluation.configuration(a | {"config": a["config"] | change})
    assert evaluation.configuration(a) != evaluation.configuration(a | {"step": 2})
    usual = vars(sbvae.resolve(sbvae.Config(model="factorvae", decoder="deconv", dataset="circles-xy:blank")))
    assert evaluation.describe(usual) == "circles-xy:blank, deconv, factorvae"
    assert evaluation.describe(usual | dict(beta=4.0, shuffle_coords=True, seed=3, steps=7, likelihood="gaussian")
                               ) == "circles-xy:blank, deconv, factorvae, gaussian, beta 4, shuffle coords"
    assert evaluation.describe(usual | dict(beta=4.0)) != evaluation.describe(usual)


def test_without_ground_truth_only_the_loss_is_measured(runs, no_pictures, capsys):
    code, out, _ = run_main(capsys, runs / "d", *FAST)
    metrics = evaluation.read_metrics(runs / "d")
    assert code == 0 and "ELBO" in out and "MIG" not in out
    assert [metrics[k] for k in ("mig", "mig_sampled", "factor_vae", "r2", "r2_held_out", "factors")] == [None] * 6
    assert metrics["elbo"] > 0 and {m["factor"] for m in metrics["latents"]} == {None}


def test_links_and_pipes_under_temporary_names(runs, capsys, tmp_path):
    """A received run folder may hold them: what a link leads to stays as it is, and nobody waits for a pipe."""
    shutil.copytree(runs / "a", tmp_path / "a", ignore=lambda *_: {"metrics.json", "evaluation.png", "geometry.png"})
    (tmp_path / "precious").write_text("precious")
    for name in ("metrics.json", "evaluation.png", "geometry.png"):
        for plant in (lambda p: p.symlink_to("../precious"), os.mkfifo):
            plant(tmp_path / "a" / f".{name}.tmp")
            code, out, err = run_main(capsys, tmp_path / "a", *FAST)
            assert code == 0 and (tmp_path / "precious").read_text() == "precious"
            assert (tmp_path / "a" / name).is_file() and not (tmp_path / "a" / name).is_symlink()
            assert not list((tmp_path / "a").glob(".*"))


def test_two_evaluations_of_one_run_wait_for_each_other(runs, no_pictures, monkeypatch):
    """While one is in a run's folder, another does not begin to write there, but does elsewhere."""
    drawn = []
    for module in {evaluation, sys.modules[evaluation.evaluate.__module__]}:
        monkeypatch.setattr(module, "draw_run", lambda run, *_: drawn.append(run.name))
    threads = [threading.Thread(target=evaluation.evaluate, args=(runs / f, "cpu", 5, 50)) for f in "ab"]
    with evaluation.alone(runs / "a"):
        for thread in threads:
            thread.start()
        threads[1].join(60)
        time.sleep(0.5)
        assert drawn == ["b"] and threads[0].is_alive()
    threads[0].join(60)
    assert drawn == ["b", "a"]


@pytest.mark.parametrize("names", [("$x_{$", "y"), ("%s", "a\nb"), ("\\frac", "$$")])
def test_names_that_look_like_formulas(names, tmp_path, monkeypatch, capsys):
    """Matplotlib would set what stands between dollars as a formula, or fail to."""
    monkeypatch.chdir(tmp_path)
    factors = np.array([(x, y) for x in range(4) for y in range(4)])
    np.savez("$x_{$.npz", images=np.random.default_rng(0).integers(0, 255, (16, 8, 8), np.uint8), factors=factors,
             factor_names=np.array(names))
    sbvae.train(sbvae.Config(dataset="$x_{$.npz", steps=1, latents=2, conv_layers=1, device="cpu", out="r"))
    code, out, err = run_main(capsys, "r", *FAST)
    assert code == 0 and Path("r/metrics.json").exists(), err


def test_a_lack_of_memory_is_one_line(runs, no_pictures, capsys, monkeypatch):
    def lack(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(evaluation, "mutual_information", lack)
    code, out, err = run_main(capsys, runs / "a", *FAST)
    assert code == 2 and "out of memory" in err and err.count("error:") == 1 and "Traceback" not in err


@pytest.mark.parametrize("call", [
    lambda z, f: evaluation.mig(z, f, bins=0), lambda z, f: evaluation.mig(z[:, :0], f),
    lambda z, f: evaluation.mig(z + 1j, f), lambda z, f: evaluation.mig(z.astype(object), f),
    lambda z, f: evaluation.mig_sampled(z, z[:, :1], f), lambda z, f: evaluation.mig_sampled(z, z, f, samples=0),
    lambda z, f: evaluation.factor_vae_metric(lambda c: c.numpy(), (3, 3), lambda c: c, votes=0),
    lambda z, f: evaluation.factor_vae_metric(lambda c: c.numpy(), (3, 3), lambda c: c, batch=1)])
def test_metrics_of_senseless_arguments(call):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError) as error:
        call(rng.normal(size=(30, 2)), rng.integers(0, 3, (30, 2)))
    assert "\n" not in str(error.value)


def test_half_precision_codes_have_single_precision_scores_and_doubles_their_own():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 5, (2000, 2))
    codes = torch.tensor(30_000 * (factors + 0.1 * rng.normal(size=factors.shape) - 2) / 2)
    for half in (codes.half(), codes.bfloat16(), codes.half().numpy()):
        exact = half.float() if isinstance(half, torch.Tensor) else half.astype(np.float32)
        assert evaluation.mig(half, factors) == evaluation.mig(exact, factors) > 0.8
    for other in (factors.astype(np.uint8), factors.astype(np.longdouble), torch.tensor(factors), factors > 2):
        assert evaluation.mig(other, factors) > 0.2
        assert np.isfinite(evaluation.mig_sampled(other, np.full(factors.shape, -9), factors))
    far = torch.tensor(factors, dtype=torch.float64) + 1e9  # a double tells these apart, a float does not
    assert evaluation.mig(far, factors) == evaluation.mig(far.numpy(), factors) > 0.8
    assert evaluation.mig(far.float(), factors) == 0


def test_a_bad_run_does_not_stop_the_others(runs, no_pictures, capsys):
    broken = runs / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "checkpoint.pt").write_bytes(b"PK\3\4 nonsense")
    (broken / "config.json").write_text("{}")
    code, out, err = run_main(capsys, runs / "missing", broken, runs / "c", *FAST)
    assert code == 2 and str(runs / "c") in out and "missing" not in out and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "missing" in errors[0] and "broken" in errors[1]


def test_a_run_that_diverged_is_one_line(runs, no_pictures, capsys, monkeypatch):
    opened = evaluation.open_run(runs / "c", "cpu")
    with torch.no_grad():
        opened[0].encoder.latents.bias.fill_(float("nan"))
    monkeypatch.setattr(sys.modules[evaluation.evaluate.__module__], "open_run", lambda *a: opened)
    (runs / "c/metrics.json").unlink(missing_ok=True)
    code, out, err = run_main(capsys, runs / "c", *FAST)
    assert code == 2 and out == "" and err.count("\n") == 1 and "not finite" in err
    assert not (runs / "c/metrics.json").exists()


def test_data_of_another_shape_is_one_line(runs, no_pictures, capsys):
    plain, before = runs / "plain.npz", (runs / "plain.npz").read_bytes()
    np.savez(plain, images=np.zeros((5, 32, 16), np.uint8))
    try:
        code, out, err = run_main(capsys, runs / "d", *FAST)
    finally:
        plain.write_bytes(before)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"has images (1, 32, 16); {runs / 'd'} was trained on (1, 16, 16)" in err


def test_a_terminal_without_superscripts(runs, no_pictures, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as left:
        m.setattr(sys, "stdout", out)
        evaluation.main([str(runs / "a"), *FAST])
    assert left.value.code == 0 and b"FactorVAE | R\\xb2 " in out.buffer.getvalue()


@pytest.mark.parametrize("arguments, message", [
    ([], "give run folders"),
    (["a", "--list"], "give run folders"),
    (["--reproduce", "fig2", "--explore", "a"], "give run folders"),
    (["a", "--steps", "5"], "--steps goes with --reproduce"),
    (["--list", "--every", "5"], "--every goes with --reproduce"),
    (["--list", "--only", "VAE"], "--only goes with --reproduce"),
    (["run", "--only", "VAE"], "--only goes with --reproduce"),
    (["--reproduce", "fig4", "--only", "VAE", "MAE"], "--only 'MAE' is in none of fig4's models: DeConv VAE; Spatial"),
    (["--reproduce", "fig4", "--only"], "expected at least one argument"),
    (["a", "--votes", "0"], "--votes must be at least 1"),
    (["a", "--samples", "1"], "--samples must be at least 2"),
    (["a", "--votes", "many"], "invalid int value"),
    (["a", "--seed", str(2**63)], "--seed must be"),
    (["a", "--sampels", "5"], "unrecognized arguments"),
    (["a", "--device", "abacus"], "a holds no run"),
])
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_command_line_calls_the_parts(monkeypatch, capsys):
    calls = []
    for module in {evaluation, sys.modules[evaluation.main.__module__]}:
        for name in ("reproduce", "list_experiments", "explore"):
            monkeypatch.setattr(module, name, lambda *a, name=name: calls.append((name, *a)))
    for arguments in (["--reproduce", "fig2", "--replicas", "2", "--steps", "9", "--every", "3", "--seed", "1",
                       "--only", "De", "--only", "Co"],
                      ["--list", "--steps", "4"], ["--explore", "runs/x", "--device", "cpu"]):
        assert run_main(capsys, *arguments)[0] == 0
    assert calls == [("reproduce", "fig2", 2, 9, 3, ["De", "Co"], None, 800, 10_000, 1),
                     ("list_experiments", None, 4, None), ("explore", "runs/x", "cpu")]


def test_a_run_gets_its_pictures(runs, capsys):
    assert run_main(capsys, runs / "a", *FAST)[0] == 0
    for name in ("evaluation.png", "geometry.png"):
        assert (runs / "a" / name).read_bytes()[:4] == b"\x89PNG"


def test_codes_of_many_images_stay_in_their_order():
    """More images than are drawn at once, and more of these than are encoded at once."""
    data = types.SimpleNamespace(device="cpu", draw=lambda classes: classes[:, :, None, None].float())
    model = types.SimpleNamespace(encode=lambda images: (images.flatten(1), -images.flatten(1)))
    classes = torch.arange(2 * 2100).view(2100, 2)
    mu, logvar = evaluation.encode_classes(model, data, classes)
    assert torch.equal(mu, classes.float()) and torch.equal(logvar, -mu)


def test_a_grid_over_many_classes_reaches_from_the_first_to_the_last():
    drawn = []
    data = types.SimpleNamespace(factor_names=("hue", "scale"), factor_sizes=(100, 4), device="cpu",
                                 draw=lambda c: drawn.append(c) or torch.zeros(len(c), 1, 64, 64))
    found = evaluation.geometry(Seer(), data, latents=[0, 1])
    classes = torch.cat(drawn)
    np.testing.assert_allclose(found["factors"], (classes.numpy() + 0.5) / [100, 4], rtol=1e-6)
    hues = classes[:, 0].unique()
    assert len(hues) == 32 and hues[[0, -1]].tolist() == [0, 99] and set(hues.diff().tolist()) == {3, 4}


def test_the_blank_image_has_its_code_in_the_order_of_the_axes(circles):
    seer = Seer(lambda xy: xy * torch.tensor([1.0, -1]).double())
    found = evaluation.geometry(seer, circles("circles-xh:blank"))
    middle = 31.5 / 64  # of an image without light, as Seer sees it
    assert found["latents"].tolist() == [3, 1]
    np.testing.assert_allclose(found["blank"], [middle, -middle], atol=1e-3)


def test_each_estimate_is_of_the_images_and_the_seed_that_were_asked_for(runs, no_pictures, monkeypatch):
    model, data, _ = evaluation.open_run(runs / "a", "cpu")
    drawn, draw = [], data.draw
    monkeypatch.setattr(type(data), "draw", property(lambda _: lambda classes: drawn.append(classes) or draw(classes)))
    found = {seed: evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200, seed=seed) for seed in (0, 1)}
    assert sum(map(len, drawn)) == 2 * (200 + 200 + 4 * 5)  # MIG, variances, a grid; all latents have collapsed
    classes = drawn[3]  # the first of the second evaluation
    mu, logvar = evaluation.encode(model, draw(classes))
    by_seed = [evaluation.mig_sampled(mu, logvar, classes, seed=seed) for seed in (0, 1)]
    assert found[1]["mig_sampled"] == pytest.approx(by_seed[1], abs=1e-6)
    assert abs(by_seed[1] - by_seed[0]) > 1e-5


def test_the_seed_of_the_command_line_is_that_of_the_estimates(runs, no_pictures, capsys):
    assert run_main(capsys, runs / "a", *FAST, "--seed", "7")[0] == 0
    assert evaluation.read_metrics(runs / "a")["estimator"] == evaluation.estimator(votes=20, samples=200, seed=7)


def test_a_run_that_was_moved_is_told_by_its_new_name(runs, no_pictures, tmp_path):
    evaluation.evaluate(runs / "c", "cpu", votes=20, samples=200)
    moved = shutil.copytree(runs / "c", tmp_path / "moved")
    assert evaluation.evaluate(moved, "cpu", votes=20, samples=200, reuse=True)["run"] == str(moved)
    assert len(no_pictures) == 1  # it was indeed not evaluated again


def test_ctrl_c_keeps_the_table_of_what_was_done(runs, no_pictures, capsys, monkeypatch):
    def evaluate(run, *arguments, evaluate=evaluation.evaluate):
        if run.name == "b":
            raise KeyboardInterrupt
        return evaluate(run, *arguments)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    code, out, err = run_main(capsys, runs / "a", runs / "b", runs / "c", *FAST)
    assert code == 130 and str(runs / "a") in out and str(runs / "c") not in out and "Traceback" not in err


def test_what_only_logs_saves_and_speeds_up_is_no_other_configuration():
    metrics = dict(step=7, config=vars(sbvae.resolve(sbvae.Config())))
    for free in (dict(save_every=3), dict(log_every=3), dict(resume="r"), dict(kernel="torch"), dict(compile=True),
                 dict(cuda_graph=True), dict(out="o"), dict(steps=9)):
        changed = metrics | dict(config=metrics["config"] | free)
        assert evaluation.configuration(changed) == evaluation.configuration(metrics), free


def test_a_run_without_pictures_has_no_metrics(runs, monkeypatch):
    (runs / "a" / "metrics.json").unlink(missing_ok=True)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(evaluation, "draw_run", full)
    with pytest.raises(OSError, match="disk full"):
        evaluation.evaluate(runs / "a", "cpu", votes=5, samples=50)
    assert not (runs / "a" / "metrics.json").exists()  # else --reproduce would take it for done


def test_metrics_from_before_a_column_existed_are_not_taken(runs, no_pictures):
    metrics, path = evaluation.evaluate(runs / "a", "cpu", votes=20, samples=200), runs / "a" / "metrics.json"
    for name in evaluation.COLUMNS.values():
        path.write_text(json.dumps({k: v for k, v in metrics.items() if k != name}))
        assert evaluation.read_metrics(runs / "a") is None, name
    path.write_text(json.dumps(metrics))
    assert evaluation.read_metrics(runs / "a") == metrics


@pytest.mark.parametrize("name", ["replicas", "steps", "every"])
def test_numbers_of_reproduce_are_at_least_one(name):  # parsed alone, lest it should train
    with pytest.raises(sbvae.InputError, match=f"--{name} must be at least 1, not 0"):
        evaluation.parse(["--reproduce", "fig4", f"--{name}", "0"])
    assert evaluation.parse(["--reproduce", "fig4", f"--{name}", "1"])


def test_list_takes_replicas_and_steps():
    args = evaluation.parse(["--list", "--replicas", "2", "--steps", "3"])
    assert (args.list, args.replicas, args.steps) == (True, 2, 3)
