"""Evaluation of Spatial Broadcast VAEs (Watters et al. 2019): every metric, figure and table of the paper.

    python eval.py RUN [RUN ...]                     # metrics and pictures of runs, mean ± std over their seeds
    python eval.py --reproduce fig4 --steps 20000    # train what is missing, then the paper's result and ours
    torchrun --nproc-per-node 2 eval.py --reproduce fig4         # the same, its runs dealt out to two processes
    python eval.py --list                            # all figures and tables, and how long they take here
    python eval.py --explore RUN                     # a window to play with a model's latents

Metrics are disentanglement_lib's MIG (20-bin histograms of the posterior means), Chen et al.'s own MIG (samples of
the posterior), Kim and Mnih's FactorVAE metric, the loss and its parts, latents used, and the share of the two most
informative latents' variance that an affine map from two factors explains (R²).

N images, K latents, F factors; (n, 2) is a grid over two factors. Letters and numbers in brackets are the paper's.
Figures take plain dicts and arrays, write one PNG and return their Figure; `results` is {label: [metrics dicts, one
per run]}, in the order in which the models are to appear; a metric that is None or not finite is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as in sbvae.py, for the runs that --reproduce trains
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main()

import torch

import gen_circles
import sbvae

BINS = 20  # of a latent's histogram, as in disentanglement_lib
VOTE_IMAGES = 64  # images a vote of the FactorVAE metric, as there
LEAST_STD = 0.05  # latents whose means vary less have collapsed and don't vote, as there
ENCODE = 64  # images at once: more leave a CPU's cache (0.65 ms an image and core, 1.0 to 1.4 with 512)


# ---------------------------------------------------------------------------------------------------- metrics


def check_codes(codes, factors):
    """-> codes (N, K), factors (N, F) as arrays. ValueError when they are not, or not of the same images."""
    codes = codes.float() if isinstance(codes, torch.Tensor) and codes.dtype == torch.bfloat16 else codes
    codes, factors = (a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
                      for a in (codes, factors))
    if codes.ndim != 2 or factors.ndim != 2 or not len(codes) == len(factors) > 0 or not codes.shape[1]:
        raise ValueError(f"codes must be (N, K) and factors (N, F), not {codes.shape} and {factors.shape}")
    if codes.dtype.kind not in "fiub":
        raise ValueError(f"codes must be real numbers, not {codes.dtype}")
    if codes.dtype not in (np.float32, np.float64):  # histograms of a half are coarse, of an integer not meant
        codes = codes.astype(np.float32 if codes.dtype == np.float16 else np.float64)
    if not np.isfinite(codes).all():
        raise ValueError("codes are not finite")
    return codes, factors


def entropy(*labels) -> float:
    """Entropy, in nats, of the joint distribution of labels that np.unique gave, each (N,) integer from 0 on."""
    cell = np.ravel_multi_index(labels, [a.max() + 1 for a in labels])
    share = np.unique(cell, return_counts=True)[1] / len(cell)
    return float(-(share * np.log(share)).sum())


def histogram_cells(code, bins):
    """(N,) float -> (N,) which of `bins` equally wide bins from the smallest value to the largest, as integers
    from 0 on. A range too narrow for so many floats is a constant: one bin."""
    try:
        edges = np.histogram_bin_edges(code, bins)  # of the dtype of the codes
    except ValueError:
        return np.zeros(len(code), int)
    return np.digitize(code, edges[:-1]) - 1  # so the largest value is in the last bin


def mutual_information(codes, factors, bins=BINS):
    """I(bin of latent k; class of factor f) in nats: codes (N, K), factors (N, F) of any labels -> (K, F) float64.

    Of the histogram of `bins` equally wide bins and N images it overestimates what is independent, by about
    (bins - 1) (classes - 1) / 2 N: 0.04 nats at 20 bins, 40 classes, 10,000 images. ValueError for wrong
    shapes, codes that are not finite, and less than one bin.
    """
    codes, factors = check_codes(codes, factors)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    cells = [histogram_cells(code, bins) for code in codes.T]
    classes = [np.unique(factor, return_inverse=True)[1] for factor in factors.T]
    return np.array([[max(entropy(a) + entropy(b) - entropy(a, b), 0.0) for b in classes] for a in cells])


def information_gap(information, factors) -> float:
    """Mean over factors of (largest - second largest information) / entropy, from (K, F) and (N, F).

    A factor that is constant has no information to give: it is left out, and where all are, the gap is 0. With
    one latent the second largest is 0.
    """
    entropies = np.array([entropy(np.unique(factor, return_inverse=True)[1]) for factor in factors.T])
    varied = entropies > 0
    second, first = np.sort(np.vstack([np.zeros_like(information[:1]), information]), axis=0)[-2:, varied]
    return float(((first - second) / entropies[varied]).mean()) if varied.any() else 0.0


def mig(codes, factors, bins=BINS) -> float:
    """Mutual information gap (Chen et al. 2018): how much more the best latent knows of a factor than the second
    best, as a share of the factor's entropy, mean over factors. 1 is best.

    codes (N, K) posterior means, factors (N, F) classes. The estimator is disentanglement_lib's: histograms of
    `bins` bins. They divide by zero for a constant factor, which `information_gap` leaves out.
    """
    codes, factors = check_codes(codes, factors)
    return information_gap(mutual_information(codes, factors, bins), factors)


def log_mixture(z, mu, logvar):
    """log mean_n N(z; mu_n, exp(logvar_n)): z (S,), mu and logvar (N,) -> (S,).

    Each z must come from one of the components, which keeps the sum away from zero without a maximum taken out.
    """
    scale = (-0.5 * logvar).exp().clamp(max=1e30)  # zero times infinity were NaN
    rows = max(1, 2**20 // len(mu))  # what stays in the cache is faster
    sums = [((part[:, None] - mu) * scale).square_().mul_(-0.5).exp_() @ scale for part in z.split(rows)]
    return torch.cat(sums).log() - math.log(len(mu)) - 0.5 * math.log(2 * math.pi)


@torch.no_grad()
def sampled_information(mu, logvar, factors, samples=10_000, seed=0):
    """I(z_k; v_f) in nats of samples of the posterior, by Chen et al.'s own estimator (their C): (K, F) float64.

    mu, logvar (N, K), factors (N, F) classes. I = E log q(z_k | v_f) - log q(z_k), with q(z_k) the mixture of
    the N posteriors, q(z_k | v_f) that of the images of this class, and one sample each of the first `samples`
    images' posteriors. They mix over all 737,280 images of dSprites, we over N drawn at random, N / classes for
    each class. As a sample's own image is in both mixtures, I comes out too large by

        (classes d(z_k | v_f) - d(z_k)) / 2 N,    d(z) = E_n integral q(z | x_n)^2 / q(z) dz - 1,

    to first order in 1 / N, for means in a bounded range: d + 1 is how many posteriors side by side fill it, a
    latent's range / 3.5 sigma. One with d = 10 that knows nothing of a factor of 40 classes is so said, from N =
    10,000 images, to know 0.02 nats. The tests measure it. ValueError for wrong shapes and codes that are not finite.
    """
    device = mu.device if isinstance(mu, torch.Tensor) else "cpu"
    factors = check_codes(mu, factors)[1]
    mu, logvar = (torch.from_numpy(check_codes(a, factors)[0]).to(device) for a in (mu, logvar))
    if mu.shape != logvar.shape or samples < 1:
        raise ValueError(f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} must agree, samples be at least 1, "
                         f"not {samples}")
    noise = torch.randn(min(samples, len(mu)), mu.shape[1], generator=torch.Generator().manual_seed(seed))
    z = mu[: len(noise)] + (0.5 * logvar[: len(noise)]).exp() * noise.to(mu)
    information = np.zeros((mu.shape[1], factors.shape[1]))
    for k in range(mu.shape[1]):
        marginal = log_mixture(z[:, k], mu[:, k], logvar[:, k])
        for f, classes in enumerate(torch.from_numpy(np.unique(c, return_inverse=True)[1]) for c in factors.T):
            total = -marginal.double().sum()
            for c in range(int(classes.max()) + 1):
                images = (classes == c).nonzero().squeeze(1).to(mu.device)
                own = images[images < len(z)]
                if len(own):
                    total += log_mixture(z[own, k], mu[images, k], logvar[images, k]).double().sum()
            information[k, f] = max(total.item() / len(z), 0.0)
    return information


def mig_sampled(mu, logvar, factors, samples=10_000, seed=0) -> float:
    """The gap as in `mig`, of `sampled_information`, which see: Chen et al.'s own estimator.

    The two differ: the means of a latent that is all but idle still say something, which a histogram with bins
    of any width finds and which drowns in the noise of a sample.
    """
    return information_gap(sampled_information(mu, logvar, factors, samples, seed), check_codes(mu, factors)[1])


def draw_classes(n, factor_sizes, generator):
    """(n, F) int64: classes drawn independently and uniformly."""
    return torch.stack([torch.randint(size, (n,), generator=generator) for size in factor_sizes], 1)


def factor_vae_metric(represent, factor_sizes, draw, votes=800, batch=VOTE_IMAGES, seed=0, images=10_000,
                      least_std=LEAST_STD) -> float:
    """The metric of Kim and Mnih (2018): from which latent varies least, tell which factor was held fixed. 1 is
    best; guessing gives 1 / factors.

    draw(classes (n, F) int64) -> images; represent(images) -> codes (n, K). A vote: fix one factor, draw the
    others `batch` times, take the latent whose variance, in units of that over `images` images, is least. The
    majority of `votes` votes names a factor for each latent; returned is the share of as many fresh votes that
    it gets right. As in disentanglement_lib, latents whose means have a standard deviation below `least_std`
    don't take part, and without any the metric is 0. Neither do factors of a single class. ValueError for codes
    that are not finite, without votes, and for fewer than two images a vote or in all.
    """
    if votes < 1 or min(batch, images) < 2:
        raise ValueError(f"votes must be at least 1, not {votes}, batch and images at least 2, not {batch}, {images}")
    generator, blocks = torch.Generator().manual_seed(seed), []
    varied = torch.tensor([f for f, size in enumerate(factor_sizes) if size > 1])

    def codes_of(classes):
        return check_codes(represent(draw(classes)), classes)[0].astype(np.float64)

    for start in range(0, images, 1024):
        blocks.append(codes_of(draw_classes(min(1024, images - start), factor_sizes, generator)))
    variance = np.concatenate(blocks).var(0, ddof=1)
    active = np.sqrt(variance) >= least_std
    if not active.any() or not len(varied):
        return 0.0
    counts = np.zeros((2, active.sum(), len(factor_sizes)), int)  # votes to learn from, votes to judge by
    at_once = max(1, 1024 // batch)
    for half in counts:
        for start in range(0, votes, at_once):
            n = min(at_once, votes - start)
            classes = draw_classes(n * batch, factor_sizes, generator).view(n, batch, -1)
            fixed = varied[torch.randint(len(varied), (n,), generator=generator)]
            rows = torch.arange(n)
            classes[rows, :, fixed] = classes[rows, 0, fixed][:, None]
            codes = codes_of(classes.flatten(0, 1)).reshape(n, batch, -1)
            least = (codes.var(1, ddof=1)[:, active] / variance[active]).argmin(1)
            np.add.at(half, (least, fixed.numpy()), 1)
    named = counts[0].argmax(1)
    return float(counts[1][np.arange(len(named)), named].sum() / votes)


def affine_fit(factors, codes, fit=None):
    """How well an affine map takes factors (n, 2) to codes (n, 2): R^2 where it was fitted, R^2 elsewhere.

    It is the least-squares map of the points where `fit` (n,) bool is true (None: all of them, and the second
    R^2 is None). R^2 = 1 - squared residuals / squared distances from the mean of these points, both summed
    over the latents: 1 when the codes are an affine map of the factors, be it of one of them alone, 0 for codes that
    are constant.
    """
    factors, codes = (np.asarray(a, np.float64) for a in (factors, codes))
    fit = np.ones(len(factors), bool) if fit is None else np.asarray(fit)
    inputs = np.column_stack([factors, np.ones(len(factors))])
    residuals = codes - inputs @ np.linalg.lstsq(inputs[fit], codes[fit], rcond=None)[0]

    def r2(where):
        spread = np.square(codes[where] - codes[where].mean(0)).sum()
        return float(1 - np.square(residuals[where]).sum() / spread) if spread > 0 else 0.0

    return r2(fit), None if fit.all() else r2(~fit)


# ------------------------------------------------------------------------------------------------------- runs


def open_run(path, device=None):
    """The model of a run folder in eval mode, its data set, both on the device, and its step. Raises InputError, also
    when the data set's images have another shape by now."""
    config, checkpoint = sbvae.read_checkpoint(Path(path))
    model = sbvae.build_model(dataclasses.replace(config, kernel="auto"))
    sbvae.restore({"model": model}, checkpoint, path)
    device = sbvae.choose_device(sbvae.resolve(sbvae.Config(device=device)))[0]
    data = sbvae.load_dataset(config.dataset, device)
    if model.encoder.shape != (shape := (data.channels, data.height, data.width)):
        raise sbvae.InputError(f"{config.dataset} has images {shape}; {path} was trained on {model.encoder.shape}")
    return model.eval().to(device), data, checkpoint["step"]


@torch.no_grad()
def encode(model, images):
    """mu and logvar (n, K), in pieces that suit the cache."""
    return tuple(torch.cat(part) for part in zip(*map(model.encode, images.split(ENCODE))))


def encode_classes(model, data, classes):
    """mu and logvar (n, K), on the CPU, of the images of classes (n, F)."""
    parts = [encode(model, data.draw(part.to(data.device))) for part in classes.split(1024)]
    return tuple(torch.cat(part).cpu() for part in zip(*parts))


@torch.no_grad()
def measure_loss(model, data, samples, seed):
    """-> dict of elbo, nll, nll_floor, kl, latents_used over images that data.sample draws from the seed; posterior
    variance of each latent (K,), mean over those of these images that are not blank (ours 24).

    As in training, with a sample of the posterior, but in fp32; latents used as there, by the image: G's "mean
    number of latent coordinates with standard deviation less than 0.5". nll_floor is the NLL of a decoder that
    paints every pixel of these images exactly: for a Bernoulli their entropy, for a Gaussian its constant.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    sums, lit, logvars = torch.zeros(4, dtype=torch.float64), [], []
    for start in range(0, samples, 32):
        images = data.sample(min(32, samples - start), generator)
        out = model(images, generator)
        _, nll, kl = sbvae.vae_loss(out.logits, images, out.mu, out.logvar, likelihood=model.config.likelihood)
        used = (out.logvar < 2 * math.log(0.5)).sum(1).float().mean()
        floor = (torch.special.entr(images) + torch.special.entr(1 - images)).flatten(1).sum(1).mean()
        if model.config.likelihood == "gaussian":
            floor = torch.full_like(nll, images[0].numel() * math.log(2 * math.pi * 0.3) / 2)
        sums += len(images) * torch.stack([nll, kl, used, floor]).double().cpu()
        lit.append(images.flatten(1).any(1, keepdim=True).cpu())
        logvars.append(out.logvar.cpu())
    nll, kl, used, floor = (sums / samples).tolist()
    variance = torch.cat(logvars)[sbvae.not_black(torch.cat(lit))].exp().double().mean(0)
    return dict(elbo=nll + kl, nll=nll, nll_floor=floor, kl=kl, latents_used=used), variance.numpy()


def geometry(model, data, latents=None):
    """How a grid over two factors lies in the two most informative latents (Figs. 4, 11 to 20), or None when
    fewer than two factors of `data` are known or the model has a single latent.

    The factors are x and y where there are such, else the first two; the others stay at their middle class. At
    most 32 classes of each, n points. `latents`: indices; None takes the two of lowest mean posterior variance.
    -> dict of
    factors     (n, 2) in [0, 1], shares of the factors' ranges; the first factor slowest
    shape       (2,) classes of each; names (2,) theirs
    codes       (n, 2) posterior means; latents (2,) their indices
    held_out    (n,) bool: in the hole of the data set
    r2, r2_held_out   of `affine_fit`, from factors to codes where the data is; None without a hole
    blank       (2,) code of the black image, None where the data has none
    """
    names, sizes = data.factor_names or (), data.factor_sizes or ()
    varied = [f for f, size in enumerate(sizes) if size > 1]
    pair = [names.index(n) for n in ("x", "y")] if {"x", "y"} <= {names[f] for f in varied} else varied[:2]
    if data.draw is None or len(pair) < 2 or model.config.latents < 2:
        return None
    if latents is None:
        latents = np.argsort(measure_loss(model, data, 1024, seed=0)[1], kind="stable")[:2]
    axes = [torch.linspace(0, sizes[f] - 1, min(sizes[f], 32)).round().long() for f in pair]
    grid = torch.cartesian_prod(*axes)  # (n, 2)
    classes = torch.tensor([size // 2 for size in sizes]).repeat(len(grid), 1)
    classes[:, pair] = grid
    factors = ((grid + 0.5) / torch.tensor([sizes[f] for f in pair])).numpy()
    latents = np.asarray(latents)[:2]
    codes = encode_classes(model, data, classes)[0].numpy()[:, latents]
    hole = getattr(data, "hole", None) is not None
    held_out = data.held_out(classes).cpu().numpy() if hole else np.zeros(len(grid), bool)
    r2, r2_held_out = affine_fit(factors, codes, ~held_out)
    blank = getattr(data, "blank", None)
    if blank is not None:
        blank = encode(model, blank[None])[0][0].cpu().numpy()[latents]
    return dict(factors=factors, shape=tuple(map(len, axes)), names=tuple(names[f] for f in pair), codes=codes,
                latents=latents, held_out=held_out, r2=r2, r2_held_out=r2_held_out, blank=blank)


def estimator(votes, samples, seed):
    """What the numbers in metrics.json depend on beside the run. Training draws its images from its own seed, 0, 1 and
    so on; those of the loss come from one far from these, lest they be training's."""
    return dict(samples=samples, loss_samples=(samples + 1) // 2, bins=BINS, votes=votes, vote_images=VOTE_IMAGES,
                least_std=LEAST_STD, seed=seed, loss_seed=10**9 + seed, precision="fp32")


def evaluate(run, device=None, votes=800, samples=10_000, seed=0, reuse=False) -> dict:
    """Every metric of a run: returned, and written to metrics.json and, as pictures, into the run folder.

    `samples` images of factor classes give MIG and its sampled relative, as many again the variances of the
    FactorVAE metric, half as many from `data.sample` ELBO, NLL, KL and latents used: 5,000 leave an ELBO of sprites
    uncertain by 2.7, alike for all models, as a seed draws the same images for each (a GPU draws others than a CPU),
    none of which training has drawn where images have no end.
    Classes are drawn independently and uniformly, from a data set's hole too and never blank: only with independent
    factors can MIG and the FactorVAE metric be 1. Continuous factors are in the classes that the data set cuts them
    into. Where the ground truth, or a complete grid of it, is missing these are None. `reuse`: metrics.json of the
    same step and estimator is returned as it is. Raises InputError, and OSError when the run cannot be written.
    """
    run, start = Path(run), time.perf_counter()
    how = estimator(votes, samples, seed)
    found = read_metrics(run) if reuse else None
    if found and found["estimator"] == how and found["step"] == sbvae.read_checkpoint(run)[1]["step"]:
        return found
    model, data, step = open_run(run, device)
    with alone(run):
        return evaluate_model(run, model, data, step, how, start)


@contextlib.contextmanager
def alone(folder):
    """Wait until no other process is in such a block for this folder: two that write the same files under the same
    temporary names would meet. Where a file system can't lock a folder they may."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def evaluate_model(run, model, data, step, how, start):
    """`evaluate`, once all is read."""
    votes, samples, seed = how["votes"], how["samples"], how["seed"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 proper, on a GPU too
    loss, variance = measure_loss(model, data, how["loss_samples"], how["loss_seed"])
    if not np.isfinite([*loss.values(), *variance]).all():
        raise sbvae.InputError(f"{run}: ELBO or posteriors of step {step:,} are not finite; the run has diverged")
    order = np.argsort(variance, kind="stable").tolist()
    latents = [dict(index=k, variance=float(variance[k]), factor=None, information=None) for k in order]
    scores = dict.fromkeys(("mig", "mig_sampled", "factor_vae", "r2", "r2_held_out"))
    if data.draw is not None:
        classes = draw_classes(samples, data.factor_sizes, torch.Generator().manual_seed(seed))
        mu, logvar = encode_classes(model, data, classes)
        information = mutual_information(mu, classes)
        scores["mig"] = information_gap(information, classes.numpy())
        scores["mig_sampled"] = mig_sampled(mu.to(data.device), logvar.to(data.device), classes, seed=seed)
        scores["factor_vae"] = factor_vae_metric(
            lambda images: encode(model, images)[0], data.factor_sizes, lambda c: data.draw(c.to(data.device)),
            votes, seed=seed, images=samples)
        sizes = np.array(data.factor_sizes)
        chance = (BINS - 1) * (sizes - 1) / (2 * samples)  # what an idle latent seems to know
        shares = (information - chance) / np.log(np.maximum(sizes, 2))
        for latent in latents:  # its factor is the one of which it knows the largest share, a twentieth at least
            k, f = latent["index"], shares[latent["index"]].argmax()
            latent["information"] = float(information[k, f])
            latent["factor"] = data.factor_names[f] if shares[k, f] >= 0.05 else None
        if found := geometry(model, data, order[:2]):
            scores["r2"], scores["r2_held_out"] = found["r2"], found["r2_held_out"]
    versions = sbvae.versions(next(model.parameters()).device)
    metrics = dict(
        run=str(run), config=dataclasses.asdict(model.config), versions=versions, step=step, **loss, **scores,
        latents=latents, estimator=how, seconds=round(time.perf_counter() - start, 1),
        factors=None if data.draw is None else dict(zip(data.factor_names, map(int, data.factor_sizes))))
    draw_run(run, model, data, metrics)  # first: a run that has metrics has its pictures
    with sbvae.atomically(run / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def read_metrics(run) -> dict | None:
    """metrics.json of a run folder, None when there is none or it is damaged."""
    metrics = read_json(Path(run) / "metrics.json") or {}
    number, always = lambda x: type(x) in (int, float), ("step", "elbo", "nll", "kl", "latents_used")  # noqa: E731
    kinds = dict(run=str, config=dict, latents=list, estimator=dict)
    sound = (all(isinstance(metrics.get(name), kind) for name, kind in kinds.items())
             and all(number(metrics.get(name)) for name in always)
             and all(name in metrics and (metrics[name] is None or number(metrics[name])) for name in COLUMNS.values())
             and all(isinstance(m, dict) and type(m.get("index")) is int and number(m.get("variance"))
                     and isinstance(m.get("factor", 0), (str, type(None))) for m in metrics["latents"]))
    return metrics | {"run": str(run)} if sound else None  # it may have been moved


def read_json(path) -> dict | None:
    """The object in a JSON file, None when there is none or it is damaged."""
    try:
        with open(path, opener=sbvae.plain_file) as file:
            found = json.load(file)
        return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------------ tables

COLUMNS = {"step": "step", "ELBO": "elbo", "NLL": "nll", "NLL floor": "nll_floor", "KL": "kl",
           "latents used": "latents_used", "MIG": "mig", "MIG sampled": "mig_sampled", "FactorVAE": "factor_vae",
           "R²": "r2", "R² held out": "r2_held_out"}
DIGITS = dict(step=0, elbo=1, nll=1, nll_floor=1, kl=2, latents_used=2)  # else 3


def configuration(metrics) -> tuple:
    """What two runs share when they differ in the seed alone (hashable)."""
    free = ("seed", "out", "device", "kernel", "cuda_graph", "compile", "resume", "steps", "log_every", "save_every")
    config = {k: v for k, v in metrics["config"].items() if k not in free} | {"step": metrics["step"]}
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(config.items()))


def describe(config: dict) -> str:
    """The configuration in words: data set, decoder, and what is not the paper's; not the seed."""
    given = {k: config[k] for k in ("dataset", "decoder", "model", "likelihood")}
    usual = vars(sbvae.resolve(sbvae.Config(**given)))
    free = (*given, "seed", "out", "device", "kernel", "cuda_graph", "compile", "resume", "steps", "log_every",
            "save_every", "image_shape", "precision")
    other = [name.replace("_", " ") + ("" if value is True else f" {value:g}") for name, value in config.items()
             if name not in free and value != usual[name]]
    kind = [v for v in (config["model"], config["likelihood"]) if v not in ("vae", "bernoulli")]
    return ", ".join([Path(config["dataset"]).stem, config["decoder"], *kind, *other])


def table(results) -> str:
    """Markdown: a row for each of `results` (dicts as of `evaluate`), then for each configuration with several runs
    mean ± standard deviation (n - 1). Columns that would be empty are left out."""
    groups = {}
    for metrics in results:
        groups.setdefault(configuration(metrics), []).append(metrics)
    columns = {title: key for title, key in COLUMNS.items() if any(m[key] is not None for m in results)}
    rows, mixed = [["run", "n", *columns]], len({m["config"]["precision"] for m in results}) > 1
    for group in [[m] for m in results] + [g for g in groups.values() if len(g) > 1]:
        config = group[0]["config"]
        name = group[0]["run"] if len(group) == 1 else describe(config) + f", {config['precision']}" * mixed
        rows.append([name, str(len(group)), *(
            mean_cell([m[key] for m in (group[:1] if key == "step" else group)], DIGITS.get(key, 3))
            for key in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def signed(value) -> str:
    """+0.12, and +0.00 for what rounds to -0.00 (the format "z" for that is not in Python 3.10)."""
    return f"{round(value, 2) + 0.0:+.2f}"


def mean_cell(values, digits) -> str:
    """Mean ± standard deviation (n - 1) over runs, as text; "" when no run has a value."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}" if values else ""


# ---------------------------------------------------------------------------------------------------- figures

WIDTH, DPI = 8.3, 200  # inches and dots per inch: shown 830 pixels wide, as in a README, an inch is 100 of them
SMALL, NORMAL = 7.5, 8.5  # font sizes
# Okabe and Ito's colours, which colour-blind readers can tell apart; the two decoders have the paper's blue and orange
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00",
                                              "#f0e442")
PREFERRED = {"coordconv": GREEN, "deconv": BLUE, "broadcast": ORANGE}  # by a word in the label
MARKERS = "osD^vPX"
STAR = dict(marker="*", markersize=11, markeredgecolor="black", markeredgewidth=0.7, linewidth=0)
AXIS_LABELS = {
    "elbo": "ELBO, a loss (nats)", "nll": "NLL (nats)", "kl": "KL (nats)", "latents_used": "latents used",
    "mig": "MIG", "mig_sampled": "MIG, sampled posterior", "factor_vae": "FactorVAE metric",
    "r2": "R² of the affine map", "r2_held_out": "R² on held-out points"}


# ------------------------------------------------------------------------------------------- parts of a figure


def new_figure(width=WIDTH, height=4.0, **options):
    """A Figure that belongs to no window and no global state. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise sbvae.InputError("figures need matplotlib: pip install matplotlib") from e
    return Figure(figsize=(width, height), dpi=DPI, **options)


def save_figure(figure, path):
    """Write a PNG; a reader of `path` never sees half of it."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # names of files and factors are neither formulas nor always text
        text.set_text(text.get_text().encode(errors="replace").decode())
        text.set_parse_math(False)
    with sbvae.atomically(Path(path)) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return figure


def finite(runs, *keys):
    """The runs in which all these metrics are there and finite."""
    return [m for m in runs if all(m.get(k) is not None and math.isfinite(m[k]) for k in keys)]


def number(value, digits=2):
    """A number for a label; None and NaN are a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def median_run(runs, key="mig"):
    """The run with the median value, of an even number the lower one of the middle two, as a median run has to be a
    run. None when no run has a value."""
    ranked = sorted(finite(runs, key), key=lambda m: m[key])
    return ranked[(len(ranked) - 1) // 2] if ranked else None


def worst_and_best(runs, key="mig"):
    """Runs of the lowest and the highest value; without values, and of equals, the first and the last."""
    ranked = sorted(finite(runs, key), key=lambda m: m[key]) or list(runs)
    return ranked[0], ranked[-1]


def label_colors(labels):
    """{label: colour}: blue for the first DeConv model, orange for the first Broadcast model, then what is left."""
    colors = {}
    for word, color in PREFERRED.items():
        first = next((label for label in labels if word in label.lower() and label not in colors), None)
        if first is not None:
            colors[first] = color
    left = [c for c in (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW) if c not in colors.values()] or [BLUE]
    others = [label for label in labels if label not in colors]
    return colors | {label: left[i % len(left)] for i, label in enumerate(others)}


def style_axes(axes, xlabel=None, ylabel=None, title=None):
    """Our axes: labels in our sizes, no box, a faint grid behind."""
    axes.set_xlabel(xlabel or "", fontsize=NORMAL)
    axes.set_ylabel(ylabel or "", fontsize=NORMAL)
    if title:
        axes.set_title("\n".join(textwrap.fill(line, 44) for line in title.splitlines()), fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def mean_and_std(values):
    """-> mean, standard deviation (n - 1; 0 for a single value)."""
    values = np.asarray(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values.mean(0))


def mosaic(grid):
    """Images (rows, columns, C, H, W) in [0, 1] -> (rows (H + 2), columns (W + 2), 3), a white line around each.
    Fewer than three channels are shown as gray, by the first."""
    tiles = np.pad(np.asarray(grid, dtype=np.float32), ((0, 0),) * 3 + ((1, 1), (1, 1)), constant_values=1.0)
    rows, columns, channels, height, width = tiles.shape
    canvas = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return canvas[:, :, [0, 1, 2] if channels > 2 else [0, 0, 0]]


# -------------------------------------------------------------- reconstructions and traversals (Figs. 2, 5-10)


@torch.no_grad()
def pictures(model, data, metrics, latents=10, columns=7, seed=0):
    """What a row of Figures 2 and 5 to 10 shows of one model: a dict of
        images (2, columns, C, H, W)            data above, reconstructions from the posterior means below
        traversals (rows, columns, C, H, W)     a latent goes from -2 to 2, the others stay at the first image's mean
        labels (rows)                           latent, mean variance, most informative factor: from metrics["latents"]
    Rows are the `latents` most informative latents, the lowest mean variance first.

    The paper does not say how it chose the "seed point" of its traversals. Ours is, of 64 images of the data set, the
    one whose mean is nearest to the prior's, so that sweeps stay where the model was trained; entirely black ones,
    which have nothing to traverse, don't count. It is the first image shown.
    """
    device = next(model.parameters()).device
    images = data.sample(64, torch.Generator(device=device).manual_seed(seed))
    mu = model.encode(images)[0]
    distance = mu.square().sum(1).masked_fill(~sbvae.not_black(images), math.inf)
    first = distance.argmin().item()
    order = [first, *(i for i in range(64) if i != first)][:columns]
    rows = metrics["latents"][:latents]
    z = mu[first].repeat(len(rows), columns, 1)  # (rows, columns, K)
    for row, latent in enumerate(rows):
        z[row, :, latent["index"]] = torch.linspace(-2, 2, columns, device=device)
    traversals = torch.stack([model.pixels(model.decode(row)) for row in z])
    pairs = torch.stack([images[order], model.pixels(model.decode(mu[order]))])
    labels = [f"z{m['index']}   σ² {m['variance']:.2g}" for m in rows]
    for i, m in enumerate(rows):
        if m["factor"] and m["variance"] < 0.25:  # the paper's threshold of a latent in use (G)
            labels[i] = m["factor"] + "\n" + labels[i]
    return dict(images=pairs.cpu().numpy(), traversals=traversals.cpu().numpy(), labels=labels)


def samples_figure(panels, path, results=None, key="mig"):
    """Figures 2 and 5 to 10: {title: `pictures`} beside each other, and with `results` their MIG on the left. More than
    two stand in rows of two, MIG being one of them."""
    if not panels:
        raise sbvae.InputError("no model to draw: give at least one run")
    many = len(panels) > 2
    names = 0.95  # inches of the names of the rows
    left = WIDTH / 2 if results and many else 0.75 + 0.65 * len(results) if results else 0.0  # of the scatter
    across = WIDTH / 2 if many else (WIDTH - left) / len(panels)
    side = across - names - 0.1  # what is left for the images of each
    places = [divmod(i + bool(results), 2) if many else (0, i) for i in range(len(panels))]  # row, column
    titles = {title: textwrap.fill(title, max(int(17 * side), 12)) for title in panels}
    canvases = {}
    for title, panel in panels.items():
        pairs, sweeps = mosaic(panel["images"]), mosaic(panel["traversals"])
        gap = np.ones((panel["images"].shape[3] // 3, pairs.shape[1], 3), np.float32)
        canvases[title] = np.concatenate([pairs, gap, sweeps]), len(pairs) + len(gap)
    tallest = max(side * canvas.shape[0] / canvas.shape[1] for canvas, _ in canvases.values())
    top, bottom = 0.15 + 0.15 * max(title.count("\n") + 1 for title in titles.values()), 0.7 if results else 0.45
    down = max(tallest, 2.0 if results else 0.5) + top + bottom
    height = down * (places[-1][0] + 1)
    figure = new_figure(height=height)

    def box(x, y, w, h):  # in inches from the top left corner
        return figure.add_axes((x / WIDTH, 1 - (y + h) / height, w / WIDTH, h / height))

    if results:
        scatter_panel(box(0.55, top, left - 0.65, min(down - top - bottom, 3.5)), results, key)
    for (line, column), (title, panel) in zip(places, panels.items()):
        canvas, start = canvases[title]
        rows, columns, _, h, w = panel["traversals"].shape
        x = (0 if many else left) + column * across + names
        axes = box(x, line * down + top, side, side * canvas.shape[0] / canvas.shape[1])
        axes.imshow(canvas, aspect="auto", vmin=0, vmax=1)
        axes.set_title(titles[title], fontsize=NORMAL)
        centres = [(h + 2) * 0.5, (h + 2) * 1.5, *(start + (h + 2) * (row + 0.5) for row in range(rows))]
        axes.set_yticks([c - 0.5 for c in centres], ["data", "model", *panel["labels"]], fontsize=SMALL)
        ends = [0, columns // 2, columns - 1] if columns % 2 else [0, columns - 1]
        axes.set_xticks([(w + 2) * (c + 0.5) - 0.5 for c in ends],
                        [f"{-2 + 4 * c / (columns - 1):g}".replace("-", "−") for c in ends], fontsize=SMALL)
        axes.set_xlabel("the latent, the others as in the first image", fontsize=SMALL)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def draw_run(run, model, data, metrics):
    """A run's own pictures: run/evaluation.png and, where two factors are known, run/geometry.png."""
    title = f"{describe(metrics['config'])}, {metrics['step']:,} steps"
    samples_figure({title: pictures(model, data, metrics, columns=11)}, Path(run) / "evaluation.png")
    if found := geometry(model, data, [m["index"] for m in metrics["latents"][:2]]):
        device = next(model.parameters()).device
        samples = data.sample(16, torch.Generator(device=device).manual_seed(0)).cpu().numpy()
        geometry_figure({title: [dict(metrics, geometry=found)]}, samples, Path(run) / "geometry.png")


# --------------------------------------------------------------------------------- metrics over seeds (Fig. 2)


def scatter_panel(axes, results, key="mig"):
    """A dot per run and a star at the median run, one column per model."""
    style_axes(axes, ylabel=AXIS_LABELS.get(key, key))
    colors = label_colors(results)
    for i, (label, runs) in enumerate(results.items()):
        values = np.array([m[key] for m in finite(runs, key)])
        if not len(values):
            continue
        spread = np.random.default_rng(0).permutation(np.linspace(-0.18, 0.18, len(values))) if len(values) > 1 else 0
        axes.scatter(i + spread + 0 * values, values, s=16, color=colors[label], alpha=0.75, linewidths=0, label=label)
        axes.plot(i, median_run(runs, key)[key], **STAR, color=colors[label], zorder=3, clip_on=False)
    names = [textwrap.fill(label, 10, break_long_words=False) + f"\nn = {len(finite(runs, key))}"
             for label, runs in results.items()]
    axes.set_xticks(range(len(results)), names, fontsize=SMALL)
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.grid(visible=False, axis="x")
    if key not in ("elbo", "nll"):  # which are nowhere near 0
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def scatter_figure(results, path, key="mig"):
    """Figure 2, left: a metric over seeds, median starred."""
    figure = new_figure(width=max(3.0, min(WIDTH, 1.0 + 1.1 * len(results))), height=3.0, layout="constrained")
    scatter_panel(figure.subplots(), results, key)
    return save_figure(figure, path)


# --------------------------------------------------------------------------- rate, distortion and MIG (Fig. 3)


def convex_hull(points):
    """(N, 2) -> its corners, counter-clockwise (Andrew's monotone chain)."""

    def half(points):
        chain = []
        for x, y in points:
            while len(chain) > 1:
                (x0, y0), (x1, y1) = chain[-2:]
                if (x1 - x0) * (y - y1) - (y1 - y0) * (x - x1) > 0:  # a left turn
                    break
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    points = sorted(map(tuple, points))
    return np.array(half(points) + half(points[::-1]))


def hull_of_one_std(means, stds):
    """The region that an ellipse of one standard deviation sweeps along the line through `means`, each (N, 2): a
    list of polygons, the hull of each pair of neighbouring ellipses."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ellipses = means[:, None] + stds[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)  # (N, 60, 2)
    return [convex_hull(np.concatenate(pair)) for pair in zip(ellipses, ellipses[1:])]


def curves_figure(results, path, keys=("kl", "mig")):
    """Figure 3: NLL against KL and against MIG. For each beta, which stands in each run's "config", a dot at the mean
    over its runs, white where beta is 1; shaded, the hull of one standard deviation."""
    figure = new_figure(height=3.5, layout="constrained")
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Outline

    colors, drawn = label_colors(results), {}
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        style_axes(axes, AXIS_LABELS.get(key, key), AXIS_LABELS["nll"])
        for marker, (label, runs) in zip(itertools.cycle(MARKERS), results.items()):
            groups = {}
            for m in finite(runs, key, "nll"):
                groups.setdefault(m["config"]["beta"], []).append((m[key], m["nll"]))
            if not groups:
                continue
            betas = sorted(groups)
            means, stds = np.stack([mean_and_std(groups[beta]) for beta in betas], 1)  # each (betas, 2)
            if polygons := [Outline(p, closed=False) for p in hull_of_one_std(means, stds) if len(p) > 2]:
                # As one outline, which is filled once where its parts overlap
                axes.add_patch(PathPatch(Outline.make_compound_path(*polygons), facecolor=colors[label], alpha=0.25,
                                         linewidth=0))
                drawn["± one std"] = Patch(facecolor="0.5", alpha=0.35)
            drawn[label], = axes.plot(*means.T, color=colors[label], linewidth=1, marker=marker, markersize=5)
            if 1 in betas:
                drawn["β = 1"], = axes.plot(*means[betas.index(1)], color="0.3", linewidth=0, marker=marker,
                                            markersize=5, markerfacecolor="white", zorder=3)
            for end, offset in ((0, -14), (-1, 7)):
                axes.annotate(f"β {betas[end]:g}", means[end], (0, offset), textcoords="offset points", ha="center",
                              fontsize=SMALL, color="0.3")
            axes.margins(0.08, 0.1)
    drawn = {label: drawn.pop(label) for label in results if label in drawn} | drawn
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=len(drawn) or 1, fontsize=SMALL,
                  frameon=False)
    return save_figure(figure, path)


# ---------------------------------------------------------------------------------------- trends over training


def trend_figure(evaluated, logged, path):
    """Metrics against training steps: R² and MIG where every model was evaluated at several; NLL + KL and latents used
    as they were in training, means between log lines. A thin line per run, a thick one at the mean over the runs,
    shaded one standard deviation. Both arguments are {label: [dicts]}, a run once for each step. What no run has is not
    drawn."""
    logged = {label: runs for label, runs in logged.items() if runs}
    evaluated = {label: evaluated.get(label, []) for label in logged}
    several = all(len({m["step"] for m in runs}) > 1 for runs in evaluated.values())
    panels = [(key, evaluated) for key in ("r2", "mig") if several and any(finite(r, key) for r in evaluated.values())]
    panels += [(key, logged) for key in ("elbo", "latents_used")]
    rows, columns = {2: (1, 2), 3: (1, 3), 4: (2, 2)}[len(panels)]
    figure = new_figure(height=3.0 * rows, layout="constrained")
    from matplotlib.ticker import EngFormatter

    colors, drawn = label_colors(logged), {}
    last = max((m["step"] for runs in logged.values() for m in runs), default=1)
    for axes, (key, results) in zip(figure.subplots(rows, columns).flat, panels, strict=True):
        name = "NLL + KL (nats)" if key == "elbo" else AXIS_LABELS[key]
        style_axes(axes, "training steps", name + " in training" * (results is logged))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for marker, (label, runs) in zip(itertools.cycle(MARKERS), results.items()):
            found, lines, groups = finite(runs, key), {}, {}
            for m in sorted(found, key=lambda m: m["step"]):
                lines.setdefault(m["run"], []).append((m["step"], m[key]))
                groups.setdefault(m["step"], []).append(m[key])
            if not found:
                continue
            if len(lines) > 1:
                for line in lines.values():
                    axes.plot(*np.transpose(line), color=colors[label], linewidth=0.5, alpha=0.6)
            # A mean of fewer runs would jump
            groups = {step: values for step, values in groups.items() if len(values) == len(lines)} or groups
            steps = np.array(list(groups))
            mean, std = np.transpose([mean_and_std(values) for values in groups.values()])
            axes.fill_between(steps, mean - std, mean + std, color=colors[label], alpha=0.2, linewidth=0)
            drawn[label], = axes.plot(steps, mean, color=colors[label], linewidth=1.6, markersize=4,
                                      marker=marker if results is evaluated or len(steps) == 1 else "")
        axes.set_xlim(0, 1.02 * last)
        if key != "elbo":
            low, high = axes.get_ylim()
            low = min(0, low) if key == "r2" else 0
            axes.set_ylim(low, high + 0.05 * (high - low))  # room above a line that is nearly flat
        elif settled := [m[key] for runs in results.values() for m in finite(runs, key) if m["step"] >= last / 4]:
            margin = 0.05 * (max(settled) - min(settled)) or 1  # the first quarter would leave no room for the rest
            axes.set_ylim(min(settled) - margin, max(settled) + margin)
    names = [f"{label} (n = {len({m['run'] for m in logged[label]})})" for label in drawn]
    figure.legend(drawn.values(), names, loc="outside upper center", ncols=min(len(drawn), 3) or 1, fontsize=SMALL,
                  frameon=False)
    return save_figure(figure, path)


# -------------------------------------------------------------------------------- geometry (Figs. 4, 11 to 20)

WORST, BEST = RED, SKY  # of the replicas: the stars in the histogram and the frames of their plots
# Colours of a grid over two factors, at its corners: blue to yellow along the first factor, dark to light along the
# second. The common forms of colour blindness keep both of these.
CORNERS = np.array([[(0.08, 0.22, 0.62), (0.45, 0.75, 1.00)], [(0.62, 0.35, 0.00), (1.00, 0.80, 0.20)]])


def factor_colors(factors):
    """(n, 2) in [0, 1] -> (n, 3), between the colours of the corners."""
    a, b = np.clip(np.asarray(factors, float), 0, 1).T[:, :, None]
    return (1 - a) * ((1 - b) * CORNERS[0, 0] + b * CORNERS[0, 1]) + a * ((1 - b) * CORNERS[1, 0] + b * CORNERS[1, 1])


def grid_lines(factors):
    """Neighbours in a grid, (n, 2) in any order -> (lines, 2) indices of points, one step apart in one factor."""
    columns, rows = (np.unique(f, return_inverse=True)[1] for f in np.asarray(factors).T)
    where = {cell: i for i, cell in enumerate(zip(columns.tolist(), rows.tolist()))}
    pairs = [(i, where[n]) for (c, r), i in where.items() for n in ((c + 1, r), (c, r + 1)) if n in where]
    return np.array(pairs, int).reshape(-1, 2)


def draw_points(axes, points, found, size):
    """The grid at `points` (n, 2), in the factors' colours, what is held out in black, neighbours joined."""
    from matplotlib.collections import LineCollection

    held = np.asarray(found["held_out"], bool)
    axes.add_collection(LineCollection(points[grid_lines(found["factors"])], colors="0.7", linewidths=0.35, zorder=1))
    axes.scatter(*points.T, s=size, c=np.where(held[:, None], 0.0, factor_colors(found["factors"])), linewidths=0,
                 zorder=2)


def square_view(axes, points, margin=0.06):
    """Equal scales and a square view of all points: rotations stay rotations, folds stay visible."""
    low, high = points.min(0), points.max(0)
    half = max((high - low).max() * (0.5 + margin), 1e-3)
    for set_limits, middle in zip((axes.set_xlim, axes.set_ylim), (low + high) / 2, strict=True):
        set_limits(middle - half, middle + half)
    axes.set_box_aspect(1)


def factor_axes(axes, found, title):
    style_axes(axes, *(f"{name} (share of its range)" for name in found["names"]), title)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), box_aspect=1)
    if found["names"][1] == "y":
        axes.invert_yaxis()  # downwards, as in the images


def geometry_panel(axes, metrics, title, size, color=None):
    """The grid of `metrics["geometry"]` in latent space, with the run's MIG and R²; star and frame in a colour."""
    found = metrics["geometry"]
    codes = np.asarray(found["codes"], float)
    text = f"MIG {number(metrics.get('mig'))}, R² {number(found['r2'], 3)}"
    if found["r2_held_out"] is not None:
        text += f", held out {number(found['r2_held_out'], 3)}"
    style_axes(axes, *(f"z{k}" for k in found["latents"]), f"{title}\n{text}")
    draw_points(axes, codes, found, size)
    if found["blank"] is not None:
        axes.scatter(*found["blank"], s=160, marker="*", color="black", edgecolors="white", linewidths=0.8, zorder=3)
        codes = np.vstack([codes, found["blank"]])
    square_view(axes, codes)
    if found["blank"] is not None:
        left = found["blank"][0] < np.mean(axes.get_xlim())  # then the words go to the right of the star
        axes.annotate("blank image", found["blank"], (8 if left else -8, 0), textcoords="offset points", va="center",
                      ha="left" if left else "right", fontsize=SMALL,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))  # it may lie on the points
    axes.spines[:].set_visible(True)
    if color:
        axes.spines[:].set(color=color, linewidth=1.5)
        axes.plot(0.05, 1.13, transform=axes.transAxes, clip_on=False, **STAR, color=color)


def histogram_panel(axes, label, runs, upper, key="mig"):
    """Replicas per bin of a metric from 0 to `upper`, stars at the worst and the best, mean and deviation."""
    style_axes(axes, AXIS_LABELS[key], "replicas", label)
    values = np.array([m[key] for m in finite(runs, key)])
    counts, edges = np.histogram(values, bins=20, range=(0, upper))
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="0.75", edgecolor="white", linewidth=0.5)
    for m, color in zip(worst_and_best(runs, key), (WORST, BEST), strict=True):
        if finite([m], key):
            height = counts[min(int(m[key] / upper * 20), 19)]
            axes.plot(m[key], height, **STAR, color=color, zorder=3)
    lines = []
    for name, k, digits in (("MIG", key, 2), ("R²", "r2", 3)):
        if found := finite(runs, k):
            mean, std = mean_and_std([m[k] for m in found])
            lines.append(f"{name} {mean:.{digits}f} ± {std:.{digits}f}")
    axes.text(0.97, 0.95, "\n".join([f"n = {len(runs)}", *lines]), transform=axes.transAxes, ha="right", va="top",
              fontsize=SMALL)
    axes.set(xlim=(0, upper), ylim=(0, max(counts.max(), 1) * 1.6), box_aspect=1)
    axes.yaxis.get_major_locator().set_params(integer=True)


def geometry_figure(results, samples, path):
    """Figures 4 and 11 to 20: the embedding of a grid over two factors in the two most informative latents.

    results: {label: [metrics dicts]}, each with what `geometry` found under "geometry" (of a model's replicas only
    those with the lowest and the highest MIG need it); samples: images of the data (16, C, H, W) in [0, 1]. Above:
    where the data lies in factor space, the grid, the samples. Below, for each model: MIG over replicas, the worst, the
    best; of models with a single run their one plot, three in a row. Black: held out of training. Black star: the
    code of a blank image. The colours are those of the grid above.
    """
    if not any(results.values()):
        raise sbvae.InputError("no model to draw: give at least one run")
    results = {label: runs for label, runs in results.items() if runs}
    shown = {label: worst_and_best(runs) for label, runs in results.items()}
    single = all(len(runs) == 1 for runs in results.values())
    columns, dot = (2, 16) if single and len(results) == 1 else (3, 7)  # panels in a row, size of a point
    rows = math.ceil((3 + len(results)) / columns) if single else 1 + len(results)
    figure = new_figure(height=rows * (WIDTH / columns + 0.1), layout="constrained")
    panels = figure.subplots(rows, columns).ravel()

    found = next(iter(shown.values()))[0]["geometry"]
    factors, held = np.asarray(found["factors"], float), np.asarray(found["held_out"], bool)
    # Uniform outside the hole, as the data sets are (A.3): a cell of the grid that is in the data, a place in it
    rng, cells = np.random.default_rng(0), factors[~held]
    cell = np.array([1 / len(np.unique(f)) for f in factors.T])
    factor_axes(panels[0], found, "data: generative factors")
    draws = cells[rng.integers(len(cells), size=1500)] + cell * rng.uniform(-0.5, 0.5, (1500, 2))
    panels[0].scatter(*draws.T, s=3, color="0.35", linewidths=0)
    factor_axes(panels[1], found, "grid" + ", in black held out" * bool(held.any()))
    draw_points(panels[1], factors, found, dot)
    samples, side = np.asarray(samples), math.isqrt(len(samples))
    panels[2].imshow(mosaic(samples[: side**2].reshape(side, side, *samples.shape[1:])), vmin=0, vmax=1)
    panels[2].set_title(f"{side**2} images", fontsize=NORMAL)

    for axes in panels[2:]:
        axes.set_axis_off()
    values = [m["mig"] for runs in results.values() for m in finite(runs, "mig")]
    upper = math.ceil(10 * max(values, default=0.1) + 1e-9) / 10  # a common scale of the histograms
    for i, (label, runs) in enumerate(results.items()):
        worst, best = shown[label]
        if single:
            row = [(panels[3 + i], worst, label, None)]
        else:
            histogram, left, right = panels[3 + 3 * i : 6 + 3 * i]
            histogram.set_axis_on()
            histogram_panel(histogram, label, runs, upper)
            row = [(left, worst, "worst MIG", WORST), (right, best, "best MIG", BEST)]
            row = row if len(runs) > 1 else [(left, worst, "the only run", None)]
        for axes, metrics, title, color in row:
            axes.set_axis_on()
            geometry_panel(axes, metrics, title, dot, color)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------ paper's numbers

PAPER_COLUMNS = ("elbo", "nll", "kl", "latents_used", "mig", "factor_vae")
PAPER = {  # its tables, and Figure 5's caption, as printed. ± must be the deviation over its seeds: it does not say
    #                        ELBO          NLL           KL            latents used  MIG            FactorVAE metric
    "Table 5, 2 layers":    "339 ± 2.3     312 ± 2.7     27.5 ± 0.54   8.33 ± 0.37  0.076 ± 0.038  0.187 ± 0.027",
    "Table 5, 3 layers":    "329 ± 4.1     305 ± 4.6     24.4 ± 0.54   7.22 ± 0.34  0.147 ± 0.057  0.208 ± 0.084",
    "Table 5, 4 layers":    "341 ± 6.8     318 ± 7.7     22.6 ± 0.97   5.93 ± 0.51  0.157 ± 0.045  0.226 ± 0.046",
    "Table 5, 5 layers":    "340 ± 8.8     317 ± 9.7     22.7 ± 0.99   5.70 ± 0.37  0.173 ± 0.059  0.218 ± 0.030",
    "Table 6, 3 layers":    "372 ± 8.6     346 ± 8.9     26.8 ± 0.40   9.20 ± 0.04  0.031 ± 0.018  0.144 ± 0.031",
    "Table 6, 4 layers":    "349 ± 9.4     322 ± 10.0    27.1 ± 0.88   8.90 ± 0.24  0.025 ± 0.015  0.139 ± 0.009",
    "Table 6, 5 layers":    "340 ± 9.8     314 ± 10.4    26.0 ± 1.00   7.95 ± 0.64  0.056 ± 0.32   0.184 ± 0.053",
    "Table 6, 6 layers":    "349 ± 15.0    326 ± 16.1    23.3 ± 1.42   6.36 ± 0.81  0.056 ± 0.019  0.199 ± 0.029",
    "Table 7, 0 layers":    "329 ± 4       305 ± 5       24.5 ± 0.54   7.21 ± 0.34  0.147 ± 0.057  0.208 ± 0.084",
    "Table 7, 1 layer":     "330 ± 6       307 ± 6       23.9 ± 0.72   6.68 ± 0.46  0.164 ± 0.043  0.200 ± 0.034",
    "Table 7, 2 layers":    "349 ± 15      327 ± 17      21.5 ± 2.13   6.03 ± 0.66  0.210 ± 0.048  0.232 ± 0.045",
    "Table 7, 3 layers":    "392 ± 23      399 ± 114     15.7 ± 2.93   4.17 ± 1.23  0.160 ± 0.034  0.275 ± 0.064",
    "Table 8, 1 layer":     "347 ± 13      321 ± 14      25.8 ± 1.3    7.97 ± 0.72  0.052 ± 0.020  0.174 ± 0.043",
    "Table 8, 2 layers":    "352 ± 17      328 ± 18      23.7 ± 1.7    6.68 ± 0.78  0.051 ± 0.024  0.196 ± 0.024",
    "Table 8, 3 layers":    "365 ± 19      345 ± 21      19.7 ± 2.4    5.24 ± 0.73  0.144 ± 0.062  0.243 ± 0.043",
    "Table 9, 0 layers":    "4039 ± 3.4    4010 ± 3.3    29.3 ± 0.46   8.73 ± 0.41  0.541 ± 0.091  0.931 ± 0.043",
    "Table 9, 1 layer":     "4022 ± 3.7    4003 ± 3.7    19.3 ± 0.35   6.30 ± 0.49  0.538 ± 0.105  0.946 ± 0.043",
    "Table 9, 2 layers":    "4018 ± 3.3    3999 ± 3.3    18.5 ± 0.30   5.94 ± 0.41  0.574 ± 0.096  0.978 ± 0.027",
    "Table 9, 3 layers":    "4020 ± 3.0    4002 ± 2.9    18.3 ± 0.38   5.73 ± 0.31  0.659 ± 0.123  0.979 ± 0.037",
    "Table 10, 0 upscales": "329 ± 4.1     305 ± 4.6     24.4 ± 0.54   7.22 ± 0.34  0.147 ± 0.057  0.208 ± 0.084",
    "Table 10, 1 upscale":  "327 ± 4.4     302 ± 4.9     24.4 ± 0.55   7.29 ± 0.26  0.149 ± 0.048  0.194 ± 0.026",
    "Table 10, 2 upscales": "329 ± 4.3     304 ± 4.8     24.2 ± 0.60   7.14 ± 0.42  0.122 ± 0.045  0.235 ± 0.070",
    "Table 10, 3 upscales": "330 ± 2.4     305 ± 2.7     24.2 ± 0.24   7.39 ± 0.08  0.110 ± 0.032  0.182 ± 0.028",
    "Fig. 5, shuffled":     "362.8 ± 2.90  336.3 ± 2.98  26.56 ± 0.47  8.99 ± 0.37  0.104 ± 0.025  -",
}
# What no decoder can go below on colored sprites: 0.0424944 of 3 x 4,096 channels are on, and each costs the entropy of
# its value, 0.6136 nats on average over colours uniform in H [0, 1], S and V [0.3, 0.7]. The rest is black, at no cost.
SPRITES_FLOOR = 320.4
REMARKS = {  # printed wherever the row is
    "Table 6, 5 layers": "The paper prints ±0.32 for the MIG, as a deviation impossible: with a mean of 0.056 it is "
                         "at most 0.24. Table 8's first row should be the same model, and has other numbers.",
    "Table 7, 3 layers": "As the paper prints it; its NLL and KL add up to 414.7, not to its ELBO of 392.",
    "Table 8, 1 layer": "Table 6's row for 5 layers should be the same model, and has ELBO 340, MIG 0.056.",
} | dict.fromkeys([row for row in PAPER if row.startswith("Table 9")],
                  "Maybe of Gaussian models, though A has a Bernoulli for all: don't compare ELBO and NLL (ours 28).")


def both(row_deconv=None, row_broadcast=None, **config):
    """{label: (what differs from `Config`'s defaults, the row of PAPER)} of the two decoders."""
    kind = "FactorVAE" if config.get("model") == "factorvae" else "VAE"
    return {f"DeConv {kind}": (dict(config, decoder="deconv"), row_deconv),
            f"Spatial Broadcast {kind}": (config, row_broadcast)}


def beta_sweep():
    """Figure 3. Its text gives the ends, and that β = 1 is among the values; how many there are it does not say."""
    models = {}
    for beta in (0.4, 0.54, 0.74, 1.0, 1.4, 1.96, 2.75, 3.85, 5.4):  # log-linear on either side of 1
        at_one = both("Table 8, 1 layer", "Table 5, 3 layers")
        for label, model in (at_one if beta == 1 else both(beta=beta)).items():
            models[f"{label}, β = {beta:g}"] = model
    return models


def ablation(table, field, values, usual, **config):
    """Tables 5 to 10: one model for each value of a field of `Config`, one row of the table each."""
    rows = [row for row in PAPER if row.startswith(table + ",")]
    return {row.split(", ")[1]: (config | ({} if value == usual else {field: value}), row)
            for value, row in zip(values, rows, strict=True)}


def latent_geometry(dataset, title, paper):
    """Figures 11 to 20: both decoders in a VAE and a FactorVAE, as many replicas as in Figure 4."""
    return dict(title=f"Latent geometry: {title}", paper=paper, replicas=15, figure="geometry",
                models=both(dataset=dataset) | both(dataset=dataset, model="factorvae"))


# What each figure and table needs. models: {label: (what differs from `Config`'s defaults, the row of PAPER)}.
# replicas: seeds of each; where the paper does not say how many, they are ours. figure: how NAME.png is drawn;
# rows: of its traversals.
EXPERIMENTS = {
    "fig2": dict(
        title="DeConv and Spatial Broadcast decoder on colored sprites", replicas=25, figure="MIG and median", rows=8,
        paper="The Spatial Broadcast VAE has the higher MIG, and its traversals are aligned with the factors.",
        models=both("Table 8, 1 layer", "Table 5, 3 layers")),
    "fig3": dict(
        title="Rate, distortion and MIG of β-VAEs on colored sprites", replicas=10, figure="curves",
        paper="With the Spatial Broadcast decoder the rate-distortion curve lies lower, and MIG is higher. It gives no "
              "numbers; at β = 1 stand those of the same models in Tables 5 and 8.", models=beta_sweep()),
    "fig4": dict(
        title="Latent geometry: circles in X and Y", replicas=15, figure="geometry", models=both(dataset="circles-xy"),
        paper="The Spatial Broadcast VAE's latents are a near-perfect Euclidean transformation of X and Y, in sharp "
              "contrast to the DeConv VAE's. MIG does not show it, as it depends on rotation."),
    "fig5": dict(
        title="Shuffled coordinate channels on colored sprites", replicas=25, figure="two seeds", rows=10,  # n ours
        paper="Shuffling hurts disentangling and reconstruction: its ELBO is worse than the DeConv VAE's, its MIG is "
              "still better.",
        models={"Shuffled coordinates": (dict(shuffle_coords=True), "Fig. 5, shuffled")}
        | both("Table 8, 1 layer", "Table 5, 3 layers")),  # whose ELBO and MIG are those of the caption
    "fig6": dict(
        title="DeConv and Spatial Broadcast decoder in a FactorVAE on colored sprites", replicas=25,  # n ours
        figure="MIG and median", rows=8, models=both(model="factorvae"),
        paper="The Spatial Broadcast FactorVAE has the higher MIG. About 15% of the seeds diverged (A.2)."),
    "fig7": dict(
        title="Small circles, 0.1 of the frame", replicas=1, figure="median", rows=4,  # n ours
        models=both(dataset="circles-xyh-small"),
        paper="The DeConv VAE's latents are entangled and discontinuous, the Spatial Broadcast VAE's disentangled."),
    "fig8": dict(
        title="Tiny circles, 0.075 of the frame", replicas=1, figure="median", rows=4,  # n ours
        models=both(dataset="circles-xyh-tiny"),
        paper="The DeConv VAE's latents are entangled and discontinuous, the Spatial Broadcast VAE's disentangled."),
    "fig9": dict(
        title="CoordConv VAE on colored sprites", replicas=25, figure="MIG and median", rows=10,  # n ours
        paper="Its MIG is far lower than a Spatial Broadcast VAE's and about a DeConv VAE's, or slightly better; its "
        "latents are continuous in position and quite entangled.",
        models={"CoordConv VAE": (dict(decoder="coordconv"), None)} | both("Table 8, 1 layer", "Table 5, 3 layers")),
    "fig10": dict(
        title="Data without variation in position", replicas=1, figure="median", rows=10,  # n ours
        models={"Chairs": (dict(dataset="chairs"), None), "3D Object-in-Room": (dict(dataset="objects"), None)},
        paper="Good reconstructions and disentangling on both."),
    "fig11": latent_geometry(
        "circles-xy", "X-Y", "The Spatial Broadcast decoder improves FactorVAE, too, and there the latents are always "
        "aligned with the factors. The DeConv FactorVAE's latents are surprisingly messy."),
    "fig12": latent_geometry(
        "circles-xy:hole-center", "X-Y with a hole in the middle", "The Spatial Broadcast decoder's latents look "
        "nearly linear, through the hole, too."),
    "fig13": latent_geometry(
        "circles-xy:hole-corner", "X-Y with a hole in the corner", "The Spatial Broadcast decoder helps a lot; the "
        "extrapolation is harder than in Fig. 12."),
    "fig14": latent_geometry(
        "circles-xh", "X-H", "The Spatial Broadcast decoder helps less than on X-Y, yet quite significantly: always "
        "aligned with the factors and nearly linear in X, though not in the hue."),
    "fig15": latent_geometry(
        "circles-xh:hole-center", "X-H with a hole in the middle", "The Spatial Broadcast decoder helps a lot. "
        "FactorVAE contracts the hole."),
    "fig16": latent_geometry(
        "circles-xh:hole-corner", "X-H with a hole in the corner", "The Spatial Broadcast decoder helps significantly. "
        "FactorVAE gives up geometry to remove the hole."),
    "fig17": latent_geometry(
        "circles-rg", "R-G", "The benefit of the Spatial Broadcast decoder is less clear. It may avoid poor seeds: 3 "
        "of 15 standard VAEs have a MIG near zero."),
    "fig18": latent_geometry(
        "circles-rg:hole-center", "R-G with a hole in the middle", "The benefit is clearer than in Fig. 17."),
    "fig19": latent_geometry(
        "circles-rg:hole-corner", "R-G with a hole in the corner", "With the Spatial Broadcast decoder MIG is slightly "
        "lower, from rotation it appears; the geometry is less warped, if anything."),
    "fig20": latent_geometry(
        "circles-xh:blank", "X-H with half of the images blank", "The Spatial Broadcast decoder improves geometry and "
        "MIG; its VAE always uses a third latent for whether there is a circle."),
    "table5": dict(
        title="Convolutions of the Spatial Broadcast decoder, colored sprites", replicas=25, figure="MIG",
        paper="The deeper, the lower the rate and the higher the distortion; MIG rises, as factors are dropped.",
        models=ablation("Table 5", "conv_layers", (2, 3, 4, 5), usual=3)),
    "table6": dict(
        title="Deconvolutions of the DeConv decoder, colored sprites", replicas=25, figure="MIG",
        paper="A noisier but similar trend to Table 5's.",
        models=ablation("Table 6", "conv_layers", (3, 4, 5, 6), usual=5, decoder="deconv")),
    "table7": dict(
        title="MLP before the tile, colored sprites", replicas=25, figure="MIG",
        paper="An MLP lowers the rate and makes reconstructions poorer.",
        models=ablation("Table 7", "mlp_layers", (0, 1, 2, 3), usual=0)),
    "table8": dict(
        title="MLP of the DeConv decoder, colored sprites", replicas=25, figure="MIG",
        paper="Much as with more deconvolutions, fewer factors are represented.",
        models=ablation("Table 8", "mlp_layers", (1, 2, 3), usual=1, decoder="deconv")),
    "table9": dict(
        title="MLP before the tile, 3D Object-in-Room, 3 convolutions", replicas=25, figure="MIG",  # n ours
        paper="Two or three layers give accurate reconstructions, the right number of latents and good disentangling.",
        models=ablation("Table 9", "mlp_layers", (0, 1, 2, 3), usual=0, dataset="objects", conv_layers=3)),
    "table10": dict(
        title="Stride-2 deconvolutions in the Spatial Broadcast decoder, colored sprites", replicas=25, figure="MIG",
        paper="They hurt MIG and hardly affect the other numbers.",
        models=ablation("Table 10", "upscales", (0, 1, 2, 3), usual=0)),
}


# ---------------------------------------------------------------------------------------------- the runs of a result


@dataclasses.dataclass
class Job:
    """A run that an experiment needs."""

    label: str  # of its model in the experiment
    config: sbvae.Config  # only what differs from the defaults is set
    steps: int

    @property
    def run(self):
        return Path(sbvae.default_out(self.config))


def paper_steps(config: dict) -> int:
    return sbvae.resolve(sbvae.Config(**config)).steps


def list_jobs(name, replicas=None, steps=None, only=None) -> list[Job]:
    """The runs of an experiment, the first seed of every model first; `only`: of the models with one of these texts
    in their label, or with this label where it is a whole one. Raises InputError for an unknown name, and for a text
    that is in none.

    Their folders are `sbvae.default_out`'s with only what differs from the paper set, so that experiments that
    need the same run find it in the same folder: no seed 0, no `steps` when they are the paper's.
    """
    if name not in EXPERIMENTS:
        raise sbvae.InputError(f"--reproduce {name} is unknown; choose from {', '.join(EXPERIMENTS)}")
    models, jobs = EXPERIMENTS[name]["models"], []
    chosen = set() if only else {*models}
    for part in only or ():
        found = {part} if part in models else {label for label in models if part in label}
        if not found:
            raise sbvae.InputError(f"--only {part!r} is in none of {name}'s models: {'; '.join(models)}")
        chosen |= found
    for seed in range(replicas or EXPERIMENTS[name]["replicas"]):
        for label, (config, _) in models.items():
            if label not in chosen:
                continue
            usual = paper_steps(config)
            fewer = steps if steps not in (None, usual) else None
            jobs.append(Job(label, sbvae.Config(**config, seed=seed or None, steps=fewer), steps or usual))
    return jobs


def read_lines(path) -> list[dict]:
    """The objects in a JSON lines file, each of a "step"; none when there is no such file. Raises InputError when it is
    damaged: written anew from what can be read it would lose the rest."""
    try:
        with open(path, opener=sbvae.plain_file) as file:
            lines = [json.loads(line) for line in file if line.strip()]
        if not all(isinstance(line, dict) and type(line.get("step")) is int for line in lines):
            raise ValueError("not a log")
        return lines
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, RecursionError) as e:
        raise sbvae.InputError(f"{path} is damaged ({type(e).__name__}); restore or remove it") from e


def steps_done(run) -> int | None:
    """The step of a run's checkpoint, None where there is none. Raises InputError when it is damaged."""
    path = run / "checkpoint.pt"
    try:  # mapped, not read: this is asked often
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
        if type(step) is not int:
            raise ValueError("wrong step")
        return step
    except FileNotFoundError:
        return None
    except Exception as e:  # torch.load raises whatever the damaged bytes lead it to
        raise sbvae.InputError(f"{run}/checkpoint.pt is damaged ({type(e).__name__}); move the folder away") from e


def check_folder(job):
    """InputError when the job's folder holds a run of another configuration, or one that went further."""
    found = (read_json(job.run / "config.json") or {}).get("config")
    if (job.run / "config.json").is_symlink():  # read_json does not follow it, training would
        raise sbvae.InputError(f"{job.run}/config.json is a link; put the file itself there")
    if not isinstance(found, dict):
        return  # no run, or one that training will refuse
    free = (*sbvae.FREE_ON_RESUME, "device", "precision", "kernel", "cuda_graph", "compile", "out", "image_shape")
    for key, value in vars(sbvae.resolve(job.config)).items():
        if key not in free and found.get(key, value) != value:
            raise sbvae.InputError(f"{job.run} is a run with {sbvae.flag(key)} {found[key]}, not {value}; move it "
                                   "away")
    if (step := steps_done(job.run) or 0) > job.steps:
        raise sbvae.InputError(f"{job.run} has been trained for {step:,} steps, not {job.steps:,}; move it away, or "
                               f"ask for --steps {step}")


def is_finished(job, every=None, how=None) -> bool:
    """Trained and evaluated (with the estimator `how`, if given), or diverged: nothing is left to do."""
    if (path := job.run / "diverged.json").exists():
        if not isinstance((read_json(path) or {}).get("diverged"), str):
            raise sbvae.InputError(f"{path} is damaged; remove it, and the run is tried again")
        return True
    metrics = read_metrics(job.run)
    if metrics is None or metrics["step"] != job.steps or how not in (None, metrics["estimator"]):
        return False
    return not every or has_stage(read_lines(job.run / "history.jsonl"), job.steps, how)


def has_stage(history, step, how) -> bool:
    """Whether one of these lines is of that step and estimator; lines of several must not make one curve."""
    return any(line["step"] == step and how in (None, line.get("estimator")) for line in history)


@contextlib.contextmanager
def claim(run):
    """Make the run's folder; yield whether it is ours alone until the end of the block. The system gives the
    claim back when its holder dies, however it dies. A training that was started by hand has one, too."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a", opener=sbvae.plain_file) as mine:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (run / "metrics.jsonl").exists():  # `sbvae.open_log` locks it during the training
                with open(run / "metrics.jsonl", "a", opener=sbvae.plain_file) as log:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


def finish(job, every, device, how, say):
    """Train and evaluate what the job lacks, in stages of `every` steps, each with a line in history.jsonl.

    A resumed run continues exactly, so the stages change nothing. A run that diverges gets a diverged.json that
    says how; remove it to try again.
    """
    run = job.run
    for stage in [*range(every, job.steps, every), job.steps] if every else [job.steps]:
        start, step = time.perf_counter(), steps_done(run)
        history = read_lines(run / "history.jsonl")
        if every and stage < job.steps and has_stage(history, stage, how):
            continue
        if (step or 0) > stage:
            say(f"is past step {stage:,}, which was not evaluated, or not by this estimator")
            continue
        if (step or 0) < stage:
            say(f"steps {step or 0:,} to {stage:,}, see its train.log")
            given = dict(resume=str(run)) if step is not None else dict(vars(job.config), out=str(run), device=device)
            try:
                with open(run / "train.log", "a", opener=sbvae.plain_file) as log, contextlib.redirect_stdout(log):
                    sbvae.train(sbvae.Config(**given | dict(steps=stage)))
            except FloatingPointError as e:
                with sbvae.atomically(run / "diverged.json") as path:
                    path.write_text(json.dumps(dict(diverged=str(e), step=steps_done(run))) + "\n")
                say(e)
                return
        metrics = evaluate(run, device, how["votes"], how["samples"], how["seed"], reuse=True)
        numbers = {k: metrics[k] for k in COLUMNS.values()}
        if every and not has_stage(history, stage, how):
            with sbvae.atomically(run / "history.jsonl") as path:
                lines = [*history, dict(run=str(run), estimator=how, **numbers)]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        say(f"step {stage:,}: " + ", ".join(f"{name} {numbers[k]:.{DIGITS.get(k, 3)}f}" for name, k in COLUMNS.items()
            if k != "step" and numbers[k] is not None) + f"; {sbvae.clock(time.perf_counter() - start)}")


def reproduce(name, replicas=None, steps=None, every=None, only=None, device=None, votes=800, samples=10_000, seed=0):
    """Train and evaluate what an experiment lacks, then write results/NAME.md, NAME.png and raw/<run>.json.

    replicas, steps: None means the paper's. every: evaluate every so many steps on the way, too. only: as in
    `list_jobs`. votes, samples, seed: as in `evaluate`. Finished runs are taken as they are, unfinished ones carried
    on. Every process that runs the same command, under torchrun or by hand, on one machine or on several that share
    the folder, takes runs that no other works on; of torchrun's the first waits for all runs and writes the results,
    from what the files say. Raises InputError when a folder holds another run, before anything is trained, and at the
    end when runs could not be made.
    """
    jobs, how = list_jobs(name, replicas, steps, only), estimator(votes, samples, seed)
    rank, world = sbvae.share_machine()
    sbvae.choose_device(sbvae.resolve(sbvae.Config(device=device)))
    who = f"rank {rank}: " * (world > 1)
    for job in jobs:
        check_folder(job)
    failed, waited = {}, False
    # What is dealt to us first, then what others have not begun, or left behind
    waiting = [job for part in range(world) for job in jobs[(rank + part) % world::world]]
    while waiting:
        busy = []
        for job in waiting:
            say = functools.partial(print, f"{who}{jobs.index(job) + 1} of {len(jobs)} ", job.run, flush=True)
            try:
                if is_finished(job, every, how):
                    continue
                with claim(job.run) as ours:
                    if not ours:
                        busy.append(job)
                    elif not is_finished(job, every, how):  # by another, between the two lines above
                        finish(job, every, device, how, say)
            except (sbvae.InputError, OSError, MemoryError, RuntimeError) as e:
                failed[job.run] = explain(e)  # the exception itself holds on to the model that was too large
                say(f"error: {failed[job.run]}")
        waiting = busy
        if waiting:
            if not waited:
                print(f"{who}waiting for other processes to finish {len(waiting)} runs", flush=True)
            waited = True
            time.sleep(2)
    if rank > 0:  # has told its errors. Were it to fail, torchrun would end the first, which has tried the same runs
        return
    if len(failed) < len(jobs):  # else what is in results/ may be of better days
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        torchrun = f"-m torch.distributed.run --nproc-per-node {world} " * (world > 1 and one_machine)
        command = f"python {torchrun}eval.py --reproduce {name}" + "".join(
            f" --{flag} {value}" for flag, value, usual in (
                ("replicas", replicas, None), ("steps", steps, None), ("every", every, None),
                ("only", shlex.join(only or ()), ""), ("votes", votes, 800), ("samples", samples, 10_000),
                ("seed", seed, 0)) if value != usual)
        # Who was started by hand is the first of its own, too
        with open(jobs[0].run.parent / ".lock", "a", opener=sbvae.plain_file) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_results(name, jobs, how, command, device)
    if failed:
        raise sbvae.InputError(f"{len(failed)} of {len(jobs)} runs failed, the first: {[*failed.values()][0]}")


# ------------------------------------------------------------------------------------------------------ results


def collect(job, how) -> dict:
    """What is known of a run: metrics.json, when it is of the job's last step and of the estimator `how`; `trained`,
    with what, and the `hours` it took; its `history` of evaluations and the `log` of its training; `diverged`, if it
    did."""
    told, diverged = (read_json(job.run / f"{name}.json") or {} for name in ("config", "diverged"))
    found = dict(run=str(job.run), config=told.get("config"))
    if diverged:
        found |= {k: diverged.get(k) for k in ("diverged", "step")}
    elif (metrics := read_metrics(job.run)) and (metrics["step"], metrics["estimator"]) == (job.steps, how):
        found |= metrics
    history, log, seconds, before = [], [], 0.0, 0
    try:
        for line in read_lines(job.run / "metrics.jsonl") if found["config"] else ():
            seconds += (line["step"] - before) * found["config"]["batch_size"] / line["images_per_s"]
            before = line["step"]
            values = {key: float(line[key]) for key in ("elbo", "latents_used")}
            log.append(dict(run=found["run"], step=before, **values))
    except (sbvae.InputError, KeyError, TypeError, ValueError, ArithmeticError) as e:  # the other results are good
        seconds, log = None, []
        print(f"note: {job.run}: neither hours nor curves can be told ({type(e).__name__}: {e})", flush=True)
    try:
        history = [line | {"run": found["run"]} for line in read_lines(job.run / "history.jsonl")]
    except sbvae.InputError as e:
        print(f"note: {e}", flush=True)
    return found | dict(trained={k: v for k, v in told.items() if k != "config"}, history=history, log=log,
                        hours=None if seconds is None else seconds / 3600)


def comparison(models, jobs, found) -> str:
    """The markdown table: for each model a row with the paper's numbers, where it has any, and one with ours."""
    keys, rows, remarks = [k for k in COLUMNS.values() if k != "step"], [], {}
    for label, (config, row) in models.items():
        if row:
            cells = dict(zip(PAPER_COLUMNS, re.split("  +", PAPER[row]), strict=True))
            notes = [REMARKS[row]] if row in REMARKS else []
            if float(cells["nll"].split()[0].replace("-", "inf")) < SPRITES_FLOOR:
                notes.append(f"An NLL below {SPRITES_FLOOR} nats, the entropy of the images that A.3 describes, is out "
                             "of any decoder's reach: colours or images must have been others (ours 27).")
            numbers = ", ".join(str(remarks.setdefault(note, len(remarks) + 1)) for note in notes)
            n = "not stated" if row.startswith(("Table 9", "Fig. 5")) else "25"  # G: 25 on colored sprites
            rows.append([label, f"paper, {row}" + f" ({numbers})" * bool(numbers),
                         *(cells.get(k, "").strip("-") for k in keys), n, f"{paper_steps(config):,}", ""])
        mine = [f for job, f in zip(jobs, found, strict=True) if job.label == label]
        good = [f for f in mine if "elbo" in f]
        diverged = sum("diverged" in f for f in mine)
        n = [f"{len(good)}" + f" of {len(mine)}" * (len(good) < len(mine)), f"{diverged} diverged" * bool(diverged),
             f"{len(mine) - len(good) - diverged} missing" * (len(good) + diverged < len(mine))]
        rows.append([label, "here", *(mean_cell([f[k] for f in good], DIGITS.get(k, 3)) for k in keys),
                     ", ".join(filter(None, n)), f"{next(job.steps for job in jobs if job.label == label):,}",
                     mean_cell([f["hours"] for f in good], 1)])
    names = ["model", "", *(title for title, k in COLUMNS.items() if k != "step"), "n", "steps", "hours a run"]
    used = [i for i in range(len(names)) if i == 1 or any(row[i] for row in rows)]
    lines = [[line[i] for i in used] for line in (names, ["---"] * len(names), *rows)]
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(rows + [f"\n({number}) {note}" for note, number in remarks.items()])


def draw_results(experiment, results, path, device):
    """results/NAME.png, from {label: [metrics dicts]}, each with a run at least."""
    kind, rows = experiment["figure"], experiment.get("rows")
    if kind == "MIG":
        scatter_figure(results, path)
    elif kind == "curves":
        curves = {}
        for label, runs in results.items():
            curves.setdefault(label.split(",")[0], []).extend(runs)
        curves_figure(curves, path)
    elif kind == "geometry":
        shown = {}
        for label, runs in results.items():
            extremes = worst_and_best(runs)
            for metrics in runs:
                if metrics in extremes:
                    model, data, _ = open_run(metrics["run"], device)
                    latents = [latent["index"] for latent in metrics["latents"][:2]]
                    metrics = metrics | dict(geometry=geometry(model, data, latents))
                shown.setdefault(label, []).append(metrics)
        images = data.sample(16, torch.Generator(device=data.device).manual_seed(0))
        geometry_figure(shown, images.cpu().numpy(), path)
    else:
        chosen = {label: median_run(runs) or runs[0] for label, runs in results.items()}
        if kind == "two seeds":  # of the first model
            label, runs = next(iter(results.items()))
            chosen = {f"{label}, seed {m['config']['seed']}": m for m in runs[:2]}
        panels = {title: pictures(*open_run(m["run"], device)[:2], m, rows) for title, m in chosen.items()}
        samples_figure(panels, path, results if kind == "MIG and median" else None)


def write_results(name, jobs, how, command, device=None, out="results"):
    """results/NAME.md, NAME.png, NAME-trend.png when a log has several lines, and raw/<run>.json of each run."""
    out, experiment, found = Path(out), EXPERIMENTS[name], [collect(job, how) for job in jobs]
    (out / "raw").mkdir(parents=True, exist_ok=True)
    known = [f for f in found if "elbo" in f or "diverged" in f]
    asked = {job.label for job in jobs}
    models = {label: model for label, model in experiment["models"].items() if label in asked}
    for f in known:
        with sbvae.atomically(out / "raw" / f"{Path(f['run']).name}.json") as path:
            path.write_text(json.dumps({k: v for k, v in f.items() if k != "log"}, indent=1) + "\n")
    good, evaluated, logged = ({label: [] for label in models} for _ in range(3))
    for job, f in zip(jobs, found, strict=True):
        if "elbo" in f:
            good[job.label].append(f)
            evaluated[job.label] += [line for line in f["history"] if line.get("estimator") == how]
            logged[job.label] += f["log"]
    good = {label: runs for label, runs in good.items() if runs}

    title = name.replace("fig", "Figure ").replace("table", "Table ")
    text = [f"# {title}. {experiment['title']}", f"The paper: {experiment['paper']}",
            comparison(models, jobs, found)]
    if others := [label for label in experiment["models"] if label not in asked]:
        text.append(f"**Not all of its models**; without {'; '.join(others)}.")
    share = min(job.steps / paper_steps(models[job.label][0]) for job in jobs)
    if share < 1:
        text.append(f"**Fewer steps than the paper's**, {100 * share:.3g}% of them: the models need not have "
                    "converged. What can be compared is their order, not their numbers.")
    if good:
        draw_results(experiment, good, out / f"{name}.png", device)
        text.append(f"![{experiment['title']}]({name}.png)")
    if len({line["step"] for lines in logged.values() for line in lines}) > 1:
        trend_figure(evaluated, logged, out / f"{name}-trend.png")
        text.append(f"![metrics against steps]({name}-trend.png)")
    text += [f"```sh\n{command}\n```", "Mean ± standard deviation (n - 1) over n seeds, 0, 1, ... NLL and KL are in "
             "nats an image, ELBO = NLL + KL is a loss. R² is the share of the variance of the two latents of lowest "
             "posterior variance that the best affine map from two factors explains. Estimates: " + ", ".join(
                 f"{k.replace('_', ' ')} {v}" for k, v in how.items()) + "."]
    text += sorted({f"Trained on {f['trained'].get('hardware') or f['trained'].get('platform')}, device "
                    f"{f['config']['device']}, {f['config']['precision']}; torch {f['trained'].get('torch')}, Python "
                    f"{f['trained'].get('python')}, commit {f['trained'].get('commit')}."
                    for runs in good.values() for f in runs})
    text += [f"{f['run']} {f['diverged']}." for f in known if "diverged" in f]
    text.append("Raw: " + ", ".join(f"[{n}](raw/{n}.json)" for n in (Path(f["run"]).name for f in known)))
    with sbvae.atomically(out / f"{name}.md") as path:
        path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(f"\n{text[2]}\n\nwritten to {out / name}.md", flush=True)


# ------------------------------------------------------------------------------------------------------- --list


def step_seconds(config) -> float:
    """Seconds that a training step takes on this machine: the fastest of three, after two to warm up. The images are
    noise, so that no data set has to be there; drawing them is cheap beside the rest."""
    config = sbvae.resolve(config)
    device, precision, _ = sbvae.choose_device(config)
    config = dataclasses.replace(config, precision=precision)
    parts = [sbvae.build_model(config).to(device, memory_format=sbvae.choose_layout(config, device))]
    if config.model == "factorvae":
        parts.append(sbvae.build_discriminator(config.latents).to(device))
    model, *others = [part for p in parts for part in (p, torch.optim.Adam(p.parameters(), fused=True))]
    images = torch.rand(config.batch_size, model.encoder.convs[0].in_channels, 64, 64, device=device)
    noise = types.SimpleNamespace(sample=lambda n, generator: images)
    generator, seconds = torch.Generator(device).manual_seed(0), []
    for _ in range(5):
        start = time.perf_counter()
        sbvae.training_step(config, noise, generator, model, *others).sum().item()  # which waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def list_experiments(replicas=None, steps=None, device=None):
    """Print what --reproduce knows: what it shows, how many runs it needs and are done, their steps, and the hours that
    training the rest takes here in one process, from a few timed steps of each model."""
    speed, rows, remaining = {}, [["name", "runs", "done", "steps each", "hours", "what"]], {}
    for name, experiment in EXPERIMENTS.items():
        jobs, left = list_jobs(name, replicas, steps), {}
        for job in jobs:
            if is_finished(job):
                continue
            c = sbvae.resolve(job.config)
            key = (c.decoder, c.model, c.conv_layers, c.mlp_layers, c.upscales, sbvae.family(c.dataset) == "chairs")
            if key not in speed:
                speed[key] = step_seconds(dataclasses.replace(job.config, device=device))
            left[job.run] = (job.steps - min(steps_done(job.run) or 0, job.steps)) * speed[key] / 3600
        remaining |= left
        rows.append([name, str(len(jobs)), str(len(jobs) - len(left)), " or ".join(
            f"{n:,}" for n in sorted({job.steps for job in jobs})), f"{sum(left.values()):,.1f}", experiment["title"]])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:5])), row[5]]))
    print(f"\nRuns that several need are trained once: {len(remaining):,} are left to do, "
          f"{sum(remaining.values()):,.0f} hours. Estimated\nfor one process, without evaluation, from five steps of "
          f"each of the {len(speed)} models that are left, timed just now.")


# ------------------------------------------------------------------------------------------- latent explorer

WINDOW, MARGIN, PANEL = (1200, 640), 24, 320  # pixels: the window, its border, the square that holds an image
TOP, ROWS_LEFT, TRACK = 64, 716, (920, 1120)  # where images and rows begin, and a slider's ends
SLIDER_RANGE = 3  # a slider goes from -3 to 3: 99.7% of the prior
SWEEP_RANGE, SWEEP_SECONDS = 2, 4  # a sweep goes from -2 to 2 and back, as the traversals do
MOST_SLIDERS = 30  # a model may have more latents; those left out are the least informative
KEYS = [("mouse", "drag a slider"), ("up, down", "choose a latent"), ("left, right", "nudge it by 0.1"),
        ("space", "sweep it, and stop"), ("N", "new image, at its posterior mean"),
        ("R", "reset to that posterior mean"), ("P", "draw all latents from the prior"),
        ("S", "save this window as a PNG"), ("Q, escape", "quit")]
INK, DIM, GROUND, RAISED = (236, 236, 236), (140, 140, 148), (26, 27, 31), (46, 48, 56)
RAIL, SPREAD, CHOSEN = (84, 87, 98), (86, 180, 233), (230, 159, 0)  # blue and orange: colour-blind-safe


@dataclasses.dataclass
class Explorer:
    """All that the window shows. `handle_event` and `advance_sweep` change it, `draw_window` draws it."""

    model: sbvae.VAE
    data: object  # of `sbvae.load_dataset`
    generator: torch.Generator  # of images and prior samples
    title: str
    order: list[int]  # the latents, most informative first: the rows of sliders
    variance: list[float]  # mean posterior variance of each latent
    factors: dict[int, str]  # latent -> the factor that it tells most about, where that is known
    image: torch.Tensor = None  # (1, C, H, W) of the data set
    mean: torch.Tensor = None  # (K,) its posterior
    deviation: torch.Tensor = None  # (K,)
    z: torch.Tensor = None  # (K,) what the sliders show
    decoded: torch.Tensor = None  # (1, C, H, W) the image of `decoded_z`
    decoded_z: torch.Tensor = None
    row: int = 0  # the chosen slider
    sweeping: bool = False
    phase: float = 0.0  # of the sweep, in radians
    before: float = 0.0  # where the latent that is swept was, and returns to when another one is chosen
    dragging: bool = False
    held: set = dataclasses.field(default_factory=set)  # keys that are down: only arrows repeat
    message: str = ""
    saving: bool = False
    running: bool = True


def start_explorer(model, data, title="", factors=None, images=256) -> Explorer:
    """The state in which the window opens: the first image, at its posterior mean. Latents are sorted by their
    posterior variance, mean over so many images, less blank ones (ours 24)."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(0)  # the same images each time, in the same order
    with torch.inference_mode():
        images = data.sample(images, generator)
        variance = model.encode(images)[1][sbvae.not_black(images)].exp().mean(0)
    if not torch.isfinite(variance).all():
        raise sbvae.InputError("--explore: the model has diverged, its posterior is not finite; train it anew")
    order = variance.argsort(stable=True)[:MOST_SLIDERS].tolist()
    state = Explorer(model, data, generator, title, order, variance.tolist(), factors or {})
    new_image(state)
    return state


def new_image(state: Explorer):
    """Take an image of the data set, and its posterior mean as the latents."""
    with torch.inference_mode():
        state.image = state.data.sample(1, state.generator)
        mean, logvar = state.model.encode(state.image)
    state.mean, state.deviation = mean[0], (0.5 * logvar[0]).exp()
    set_latents(state, state.mean)


def set_latents(state: Explorer, z):  # (K,)
    state.z = z.clone()
    state.before = state.z[state.order[state.row]].item()


def choose_row(state: Explorer, row: int):
    """Go to another slider. A latent that is being swept goes back to where it was, and the sweep goes on here."""
    if row == state.row:
        return
    if state.sweeping:
        state.z[state.order[state.row]] = state.before
    state.row = row
    if state.sweeping:
        start_sweep(state)


def start_sweep(state: Explorer):
    state.before = state.z[state.order[state.row]].item()
    state.sweeping, state.phase = True, math.asin(max(-1, min(1, state.before / SWEEP_RANGE)))  # from where it is


def advance_sweep(state: Explorer, seconds: float):
    if state.sweeping:
        state.phase += 2 * math.pi * seconds / SWEEP_SECONDS
        state.z[state.order[state.row]] = SWEEP_RANGE * math.sin(state.phase)


def panel(column: int, height: int, width: int):
    """(left, top, width, height) of an image in the window, column 0 or 1: enlarged a whole number of times, or
    shrunk if it is larger than PANEL, in the middle of its square."""
    fit = min(PANEL / height, PANEL / width)
    fit = math.floor(fit) if fit >= 1 else fit
    w, h = max(1, round(width * fit)), max(1, round(height * fit))
    return MARGIN + column * (PANEL + 16) + (PANEL - w) // 2, TOP + (PANEL - h) // 2, w, h


def row_height(rows: int) -> int:
    return min(44, (WINDOW[1] - TOP - MARGIN) // rows)


def slider_value(x: int) -> float:
    """Where a mouse in this column of the window puts a latent."""
    share = (x - TRACK[0]) / (TRACK[1] - TRACK[0])
    return SLIDER_RANGE * (2 * min(max(share, 0), 1) - 1)


def slider_column(value: float) -> int:
    """Where a slider shows this value."""
    share = (min(max(value / SLIDER_RANGE, -1), 1) + 1) / 2
    return round(TRACK[0] + (TRACK[1] - TRACK[0]) * share)


def handle_event(state: Explorer, event):
    """What a PyGame event does to the state."""
    import pygame

    rows, k = len(state.order), state.order[state.row]
    if event.type in (pygame.KEYDOWN, pygame.MOUSEBUTTONDOWN):
        state.message = ""
    if event.type == pygame.QUIT:
        state.running = False
    elif event.type == pygame.KEYUP:
        state.held.discard(event.key)
    elif event.type == pygame.KEYDOWN:
        key, repeated = event.key, event.key in state.held
        state.held.add(key)
        if key in (pygame.K_UP, pygame.K_DOWN):
            choose_row(state, (state.row + (1 if key == pygame.K_DOWN else -1)) % rows)
        elif key in (pygame.K_LEFT, pygame.K_RIGHT):
            state.sweeping = False
            limit = max(SLIDER_RANGE, abs(state.z[k].item()))  # a posterior mean may lie beyond the slider
            state.z[k] = (state.z[k] + (0.1 if key == pygame.K_RIGHT else -0.1)).clamp(-limit, limit)
        elif repeated:
            pass
        elif key == pygame.K_SPACE and state.sweeping:
            state.sweeping = False
        elif key == pygame.K_SPACE:
            start_sweep(state)
        elif key == pygame.K_n:
            new_image(state)
        elif key == pygame.K_r:
            state.sweeping = False
            set_latents(state, state.mean)
        elif key == pygame.K_p:
            set_latents(state, torch.randn(state.z.shape, generator=state.generator, device=state.z.device))
        elif key == pygame.K_s:
            state.saving = True
        elif key in (pygame.K_q, pygame.K_ESCAPE):
            state.running = False
    elif event.type == pygame.MOUSEBUTTONDOWN and event.button == 1:
        x, row = event.pos[0], (event.pos[1] - TOP) // row_height(rows)
        if 0 <= row < rows and x >= ROWS_LEFT:
            choose_row(state, row)
            state.dragging = TRACK[0] - 10 <= x <= TRACK[1] + 10  # beside the slider it only chooses
    elif event.type == pygame.MOUSEBUTTONUP and event.button == 1:
        state.dragging = False
    if state.dragging and event.type in (pygame.MOUSEBUTTONDOWN, pygame.MOUSEMOTION):
        state.sweeping = False
        state.z[state.order[state.row]] = slider_value(event.pos[0])


def decode_shown(state: Explorer) -> torch.Tensor:
    """(1, C, H, W) in [0, 1]: the image of the latents that the sliders show, decoded only when they have moved."""
    if state.decoded_z is None or not torch.equal(state.decoded_z, state.z):
        with torch.inference_mode():
            state.decoded = state.model.pixels(state.model.decode(state.z[None]))
        state.decoded_z = state.z.clone()
    return state.decoded


def draw_window(surface, state: Explorer):
    """Draw the state on a PyGame surface of size WINDOW."""
    import pygame

    fonts = explorer_fonts()

    def write(text, x, y, color=INK, size=13, align="left", width=None):
        line = fonts[size].render(text, True, color)
        x -= {"left": 0, "middle": line.get_width() // 2, "right": line.get_width()}[align]
        surface.blit(line, (x, y - line.get_height() // 2), (0, 0, width or line.get_width(), line.get_height()))

    surface.fill(GROUND)
    write(state.title, MARGIN, 24, size=16, width=WINDOW[0] - 2 * MARGIN)
    for column, (name, pixels) in enumerate([("image", state.image), ("decoded", decode_shown(state))]):
        pixels = pixels[0, [0, 1, 2] if pixels.shape[1] > 2 else [0, 0, 0]]  # gray when it is not RGB
        array = (pixels * 255).round().byte().permute(2, 1, 0).cpu().numpy()  # PyGame's arrays are (x, y)
        left, top, width, height = panel(column, *pixels.shape[1:])
        pygame.draw.rect(surface, RAISED, (left - 1, top - 1, width + 2, height + 2), 1)
        surface.blit(pygame.transform.scale(pygame.surfarray.make_surface(array), (width, height)), (left, top))
        write(name, MARGIN + column * (PANEL + 16), 50, DIM)

    k, below = state.order[state.row], TOP + PANEL + 26
    about = f", tells most about {state.factors[k]}" if k in state.factors else ""
    write(f"z{k} = {signed(state.z[k].item())}{about}", MARGIN, below, CHOSEN, size=16)
    mean, deviation = state.mean[k].item(), state.deviation[k].item()
    write(f"posterior of this image, in blue: {signed(mean)} ± {deviation:.2f}; mean variance over the data "
          f"{state.variance[k]:.4f}", MARGIN, below + 24, DIM)
    for i, (key, does) in enumerate(KEYS):  # the help, always in view, in two columns
        x, y = MARGIN + i // 5 * (PANEL + 16), below + 64 + i % 5 * 24
        write(key, x, y)
        write(does, x + 88, y, DIM)
    write(state.message, WINDOW[0] - MARGIN, 24, CHOSEN, align="right")

    write("mean σ²", 892, 50, DIM, align="right")
    for value in (-SLIDER_RANGE, 0, SLIDER_RANGE):
        write(str(value), slider_column(value), 50, DIM, align="middle")
    height = row_height(len(state.order))
    for row, k in enumerate(state.order):
        top, chosen = TOP + row * height, row == state.row
        middle, ink = top + height // 2, INK if state.variance[k] < 0.25 else DIM  # "used" is a deviation below 0.5
        if chosen:
            pygame.draw.rect(surface, RAISED, (ROWS_LEFT, top, WINDOW[0] - ROWS_LEFT - 10, height), border_radius=4)
        write(f"z{k}", ROWS_LEFT + 10, middle, CHOSEN if chosen else ink)
        write(state.factors.get(k, ""), ROWS_LEFT + 44, middle, ink, width=84)
        write(f"{state.variance[k]:.4f}", 892, middle, ink, align="right")
        value, mean, deviation = state.z[k].item(), state.mean[k].item(), state.deviation[k].item()
        for color, low, high in ((RAIL, -SLIDER_RANGE, SLIDER_RANGE), (SPREAD, mean - deviation, mean + deviation)):
            pygame.draw.line(surface, color, (slider_column(low), middle), (slider_column(high), middle), 3)
        pygame.draw.line(surface, RAIL, (slider_column(0), middle - 4), (slider_column(0), middle + 4))
        pygame.draw.circle(surface, CHOSEN if chosen else ink, (slider_column(value), middle), min(7, height // 2 - 2))
        write(signed(value), WINDOW[0] - 20, middle, ink, align="right")


@functools.cache
def font_bytes() -> bytes:
    import matplotlib  # brings DejaVu Sans along, which has σ and ², and looks the same everywhere

    return (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf").read_bytes()


def explorer_fonts() -> dict:  # size in pixels -> font
    import pygame

    return {size: pygame.font.Font(io.BytesIO(font_bytes()), size) for size in (13, 16)}


def save_window(surface, run: Path) -> str:
    """Save the window as explore-1.png, explore-2.png, ... in the run folder; say where, or why not."""
    import pygame

    picture = io.BytesIO()
    pygame.image.save(surface, picture, "explore.png")
    path = next(path for i in itertools.count(1) if not (path := run / f"explore-{i}.png").exists())
    try:
        with sbvae.atomically(path) as temporary:
            temporary.write_bytes(picture.getvalue())
    except OSError as e:  # a full disk is no reason to lose the latents
        return f"not saved: {e.strerror}"
    return f"saved {path.name}"


def play(state: Explorer, surface, run: Path):
    """Events in, frames out, until the user quits: 60 a second while something moves, if decoding allows."""
    import pygame

    clock = pygame.time.Clock()
    while state.running:
        # Asleep until something happens, but for Ctrl-C, which needs the interpreter awake now and then.
        events = [] if state.sweeping else [pygame.event.wait(250)]
        for event in (*events, *pygame.event.get()):
            handle_event(state, event)
        advance_sweep(state, min(clock.tick(60) / 1000, 0.1))
        draw_window(surface, state)
        if state.saving:
            state.saving, state.message = False, save_window(surface, run)
            draw_window(surface, state)
        pygame.display.flip()


def open_window(title: str):
    """A window of size WINDOW -> its surface. InputError without a display."""
    import pygame

    asked = os.environ.get("SDL_VIDEODRIVER")
    try:
        if sys.platform == "linux" and not (asked or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise pygame.error("neither DISPLAY nor WAYLAND_DISPLAY is set")
        pygame.display.init()
        if not asked and pygame.display.get_driver() in ("offscreen", "dummy"):  # what SDL makes do with in silence
            raise pygame.error("none answers")
        pygame.font.init()
        pygame.display.set_caption(title)
        pygame.key.set_repeat(300, 40)  # milliseconds
        return pygame.display.set_mode(WINDOW)
    except pygame.error as e:
        raise sbvae.InputError(f"--explore opens a window, and there is no display for it ({e}); run it on a desktop, "
                               "or through ssh -X") from e


def named_factors(run, step: int) -> dict[int, str]:
    """Latent -> the factor that it tells most about, if metrics.json is there and of this step."""
    metrics = read_metrics(run)
    if not metrics or metrics["step"] != step:
        return {}
    return {latent["index"]: latent["factor"] for latent in metrics["latents"] if latent["factor"]}


def explore(run, device=None):
    """A window to play with the model of a run folder: an image, what the latents decode to, a slider for each
    latent. The keys are in view. Raises InputError for a bad run, and without PyGame or a display.

    A CPU is fast enough in fp32: on one core of a Zen 4 CPU an image of the paper's broadcast decoder takes 9 ms, of
    the deeper one for 3D Object-in-Room 34, in channels last (in NCHW 14 and 37; bf16 units would make it 6 and 16).
    """
    run = Path(run)
    try:
        pygame = gen_circles.import_pygame()
    except ImportError as e:
        raise sbvae.InputError(f"--explore: {e}") from e
    model, data, step = open_run(run, device)
    model.to(memory_format=torch.channels_last)
    title = f"{run.resolve().name}, step {step:,}".encode(errors="replace").decode()  # a name may be no text
    surface = open_window(title)
    try:
        play(start_explorer(model, data, title, named_factors(run, step)), surface, run)
    finally:
        pygame.quit()


# ----------------------------------------------------------------------------------------------- command line


def parse(arguments=None):
    """The command line. Raises InputError."""
    parser = sbvae.Parser(prog="eval.py", allow_abbrev=False, description="Metrics, figures and tables of trained "
                          "runs, with the paper's numbers beside them.")
    say = parser.add_argument
    say("runs", nargs="*", metavar="RUN", help="run folders: prints a table, leaves metrics.json and figures in each")
    say("--reproduce", metavar="NAME", help="a figure or table of the paper: train what is missing, evaluate it, write "
        "results/NAME.md")
    say("--list", action="store_true", help="the figures and tables, and what each of them costs")
    say("--explore", metavar="RUN", help="a window to play with a model")
    say("--replicas", type=int, help="with --reproduce, --list: seeds, in place of the paper's number")
    say("--steps", type=int, help="with --reproduce, --list: training steps, in place of the paper's number")
    say("--every", type=int, help="with --reproduce: evaluate every so many steps, too")
    say("--only", nargs="+", action="extend", metavar="TEXT", help="with --reproduce: only models with "
        "one of these in their label (' VAE' leaves out FactorVAE), or with this whole label")
    say("--device", help="cpu or cuda[:N]; default a GPU if there is one")
    say("--votes", type=int, default=800, help="of the FactorVAE metric, and as many to judge it by; default 800")
    say("--samples", type=int, default=10_000, help="images for each of the estimates; default 10000")
    say("--seed", type=int, default=0, help="of images and votes; default 0")
    args = parser.parse_args(arguments)
    if bool(args.runs) + args.list + sum(v is not None for v in (args.reproduce, args.explore)) != 1:
        raise sbvae.InputError("give run folders or one of --reproduce, --list, --explore; see --help")
    for name in ("replicas", "steps", "every", "only"):
        listed = args.list and name in ("replicas", "steps")
        if getattr(args, name) is not None and args.reproduce is None and not listed:
            raise sbvae.InputError(f"--{name} goes with --reproduce; see --help")
    for name, least in dict(replicas=1, steps=1, every=1, votes=1, samples=2, seed=0).items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63 - 1:
            raise sbvae.InputError(f"--{name} must be at least {least}, not {value}")
    return args


def evaluate_all(args) -> list[str]:
    """Evaluate args.runs one after the other and print their table; returns what went wrong."""
    results, failures = [], []
    try:
        for run in dict.fromkeys(map(Path, args.runs)):  # a run given twice is one
            try:
                results.append(evaluate(run, args.device, args.votes, args.samples, args.seed))
                print(f"{run} took {results[-1]['seconds']:.0f} s", file=sys.stderr)
            except (sbvae.InputError, OSError, MemoryError, RuntimeError) as e:
                failures.append(f"{run}: " * sbvae.lacks_memory(e) + explain(e))
    finally:  # Ctrl-C does not lose what was done before it
        if results:
            print(table(results), flush=True)
    return failures


def explain(e) -> str:
    """What to say of an exception. One that is neither bad input nor a lack of memory is raised again."""
    if isinstance(e, (sbvae.InputError, OSError)):
        return str(e)
    if not sbvae.lacks_memory(e):
        raise e
    return "out of memory; lower --samples, or close other programs"


def main(arguments=None):
    sbvae.prepare_process()
    failures = []
    try:
        args = parse(arguments)
        if args.list:
            list_experiments(args.replicas, args.steps, args.device)
        elif args.explore is not None:
            explore(args.explore, args.device)
        elif args.reproduce is not None:
            reproduce(args.reproduce, args.replicas, args.steps, args.every, args.only, args.device, args.votes,
                      args.samples, args.seed)
        else:
            failures = evaluate_all(args)
    except (sbvae.InputError, OSError, MemoryError, RuntimeError) as e:
        failures = [explain(e)]
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    for e in failures:
        print(f"error: {e}", file=sys.stderr)
    sys.exit(2 if failures else 0)


if __name__ == "__main__":
    main()
