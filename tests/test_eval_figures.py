"""The figures of eval.py: what was passed is what is drawn, where it should be; read back from the PNG."""

import copy
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import image as png
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.patches import PathPatch, Rectangle

import eval as ev
import sbvae


def runs(values, key="mig", **more):
    return [{"run": f"runs/{i}", key: v, "step": 10, **more} for i, v in enumerate(values)]


def pixel(figure, image, axes, point):
    """The colour of the PNG at a point in an axes' own coordinates."""
    x, y = axes.transData.transform(point)
    assert image.shape[1] == round(figure.get_figwidth() * figure.dpi)
    return image[min(int(image.shape[0] - y), len(image) - 1), min(int(x), image.shape[1] - 1), :3]


def stars(axes):
    """(x, y) of each coloured star."""
    return [tuple(np.ravel(line.get_xydata())) for line in axes.lines if line.get_marker() == "*"]


def scatters(axes):
    return [c for c in axes.collections if isinstance(c, PathCollection)]


def texts(figure):
    figure.draw_without_rendering()
    found = [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]
    return "\n".join(found)


# -------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_mosaic_puts_every_image_at_its_place(channels):
    grid = np.random.default_rng(0).random((2, 3, channels, 5, 9)).astype(np.float32)
    before = grid.copy()
    canvas = ev.mosaic(grid)
    assert canvas.shape == (2 * 7, 3 * 11, 3)
    inside = np.zeros(canvas.shape[:2], bool)
    for r in range(2):
        for c in range(3):
            for i in range(5):
                for j in range(9):
                    at = (7 * r + 1 + i, 11 * c + 1 + j)
                    inside[at] = True
                    wanted = grid[r, c, :3, i, j] if channels > 2 else [grid[r, c, 0, i, j]] * 3
                    assert np.array_equal(canvas[at], wanted)
    assert (canvas[~inside] == 1).all()
    assert np.array_equal(grid, before)


class Data:
    """A data set as `load_dataset` gives it: noise, the first few images black."""

    name, size, factor_names, factor_sizes, draw, device = "dots", None, None, None, None, torch.device("cpu")

    def __init__(self, shape, blank=0):
        (self.channels, self.height, self.width), self.black = shape, blank

    def sample(self, n, generator):
        images = torch.rand(n, self.channels, self.height, self.width, generator=generator)
        images[: self.black] = 0
        return images


def small_model(shape, latents=3):
    config = sbvae.Config(image_shape=list(shape), latents=latents, decoder="deconv", conv_layers=2, device="cpu")
    model = sbvae.build_model(config).eval()
    with torch.no_grad():  # untrained codes hardly differ
        model.encoder.latents.weight.mul_(30)
    return model


def told(model, order):
    """Metrics as `evaluate` gives them, with latents in that order."""
    latents = [dict(index=k, variance=0.01 * (i + 1), factor=None, information=None) for i, k in enumerate(order)]
    return dict(run="runs/a", config=vars(model.config), step=1234, mig=0.1, r2=0.5, latents=latents)


@pytest.mark.parametrize("shape, latents, blank", [((3, 16, 24), 5, 0), ((1, 24, 16), 3, 4), ((3, 16, 16), 30, 64)])
@torch.no_grad()
def test_pictures_are_the_models_own(shape, latents, blank):
    model, data = small_model(shape, latents), Data(shape, blank)
    order = np.random.default_rng(1).permutation(latents).tolist()
    metrics = told(model, order)
    metrics["latents"][0]["factor"] = "size"
    metrics["latents"][1] |= dict(factor="hue", variance=0.3)  # not in use, by the paper's threshold
    before = copy.deepcopy(metrics)
    found = ev.pictures(model, data, metrics, columns=5)
    assert metrics == before
    rows = min(latents, 10)
    assert found["images"].shape == (2, 5, *shape)
    assert found["traversals"].shape == (rows, 5, *shape)

    images = data.sample(64, torch.Generator().manual_seed(0))
    lit = [i for i, image in enumerate(images) if image.any()] or [0]
    distance = [sum(m**2 for m in model.encode(images[i : i + 1])[0][0].tolist()) for i in lit]
    first = lit[int(np.argmin(distance))]
    seed = images[first]
    others = [image for i, image in enumerate(images) if i != first]
    assert np.array_equal(found["images"][0], torch.stack([seed, *others[:4]]))
    for shown, model_image in zip(*found["images"], strict=True):
        mean = model.encode(torch.from_numpy(shown)[None])[0]
        np.testing.assert_allclose(model_image, torch.sigmoid(model.decode(mean))[0], atol=1e-5)
    mean = model.encode(seed[None])[0]
    moved = 0
    for row in range(rows):
        for column, value in enumerate((-2, -1, 0, 1, 2)):
            z = mean.clone()
            z[0, order[row]] = value
            wanted = torch.sigmoid(model.decode(z))[0].numpy()
            np.testing.assert_allclose(found["traversals"][row, column], wanted, atol=1e-5)
            z[0, order[row]], z[0, order[row - 1]] = mean[0, order[row]], value  # and a wrong latent would be seen
            moved += not np.allclose(found["traversals"][row, column], torch.sigmoid(model.decode(z))[0], atol=1e-4)
    assert moved > 2 * rows
    assert found["labels"][0] == f"size\nz{order[0]}   σ² 0.01"
    assert found["labels"][1] == f"z{order[1]}   σ² 0.3"


def colored_panel(rows, columns, shape, seed):
    """Images of one colour each, so that a pixel anywhere in a tile tells which one it is."""
    color = np.random.default_rng(seed).random((2 + rows, columns, shape[0], 1, 1)).astype(np.float32)
    images = np.broadcast_to(color, (2 + rows, columns, *shape)).copy()
    return dict(images=images[:2], traversals=images[2:], labels=[f"label {i}" for i in range(rows)])


@pytest.mark.parametrize("shapes, rows, scatter", [
    ([(3, 64, 64)], 10, False), ([(1, 24, 40), (3, 40, 24)], 3, False), ([(3, 64, 64), (3, 64, 64)], 8, True),
    ([(1, 48, 32)], 30, True), ([(3, 64, 64)] * 3, 10, True), ([(3, 24, 40)] * 3, 4, False)])
def test_the_png_shows_each_image_in_its_tile(tmp_path, shapes, rows, scatter):
    panels = {f"Model {i}": colored_panel(rows, 7, shape, i) for i, shape in enumerate(shapes)}
    before = copy.deepcopy(panels)
    results = {"DeConv VAE": runs([0.1, 0.2, 0.4]), "Broadcast VAE": runs([0.5, None])} if scatter else None
    figure = ev.samples_figure(panels, tmp_path / "a.png", results)
    image = png.imread(tmp_path / "a.png")
    assert image.shape[1] == 1660  # twice 830, a README's width
    for axes, panel in zip(figure.axes[scatter:], panels.values(), strict=True):
        channels, h, w = panel["images"].shape[2:]
        for row in range(2 + rows):
            tiles = panel["images"][row] if row < 2 else panel["traversals"][row - 2]
            gap = h // 3 if row > 1 else 0
            for column, tile in enumerate(tiles):
                # where the layout, not the code, says it is: rows of h + 2, columns of w + 2, a gap after two rows
                at = ((w + 2) * (column + 0.5) - 0.5, (h + 2) * (row + 0.5) + gap - 0.5)
                wanted = tile[:3, 0, 0] if channels > 2 else [tile[0, 0, 0]] * 3
                assert np.abs(pixel(figure, image, axes, at) - wanted).max() < 0.01, (row, column)
        between = ((w + 2) * 0.5, (h + 2) * 2 + h // 6 - 0.5)  # the gap is white
        assert (pixel(figure, image, axes, between) == 1).all()
        box = axes.get_window_extent()
        np.testing.assert_allclose(box.width / box.height, 7 * (w + 2) / ((2 + rows) * (h + 2) + h // 3), rtol=1e-3)
        assert [t.get_text() for t in axes.get_yticklabels()] == ["data", "model", *panel["labels"]]
        np.testing.assert_allclose(axes.get_yticks(), [(h + 2) * (row + 0.5) + (h // 3 if row > 1 else 0) - 0.5
                                                       for row in range(2 + rows)])
        np.testing.assert_allclose(axes.get_xticks(), [(w + 2) * (column + 0.5) - 0.5 for column in (0, 3, 6)])
        assert [t.get_text() for t in axes.get_xticklabels()] == ["−2", "0", "2"]
        assert box.x0 >= 0 and box.x1 <= 1660 and box.y0 >= 0 and box.y1 <= image.shape[0]
    for title in panels:
        assert title in texts(figure)
    words = [t for axes in figure.axes for t in (axes.title, axes.xaxis.label, *axes.get_yticklabels(),
                                                 *axes.get_xticklabels()) if t.get_text() and t.get_visible()]
    for a, b in itertools.combinations([t.get_window_extent() for t in words], 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2, "words overlap"
    if scatter:
        assert np.allclose(stars(figure.axes[0]), [(0, 0.2), (1, 0.5)])
    for a, b in zip(before.values(), panels.values(), strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_draw_run_writes_both_pictures_and_nothing_else(tmp_path):
    class Grid(Data):
        factor_names, factor_sizes = ("x", "y"), (6, 5)

        def draw(self, classes):
            generator = torch.Generator().manual_seed(0)
            basis = torch.rand(2, *map(int, (self.channels, self.height, self.width)), generator=generator)
            return torch.einsum("nf,fchw->nchw", classes.float() / 12, basis)

    shape = (1, 16, 24)
    for data, written in ((Grid(shape), {"evaluation.png", "geometry.png"}), (Data(shape), {"evaluation.png"})):
        run = tmp_path / type(data).__name__
        run.mkdir()
        model = small_model(shape)
        ev.draw_run(run, model, data, told(model, [2, 0, 1]))
        assert {p.name for p in run.iterdir()} == written
        shown = png.imread(run / "evaluation.png")
        assert shown.shape[1] == 1660 and shown.std() > 0.1


# ---------------------------------------------------------------------------------------------- metrics over seeds


@pytest.mark.parametrize("values, median", [
    ([0.3, 0.1, 0.2], 0.2), ([0.4, 0.1, 0.3, 0.2], 0.2), ([0.7], 0.7), ([None, 0.5, float("nan"), 0.1, 0.2], 0.2)])
def test_scatter_shows_every_run_and_stars_the_median(tmp_path, values, median):
    results = {"DeConv VAE": runs(values), "Broadcast VAE": runs([0.9, 0.8])}
    before = copy.deepcopy(results)
    figure = ev.scatter_figure(results, tmp_path / "a.png")
    axes, = figure.axes
    first, second = scatters(axes)
    good = [v for v in values if v is not None and v == v]
    assert first.get_offsets()[:, 1].tolist() == good
    assert (np.abs(first.get_offsets()[:, 0]) < 0.3).all() and (np.abs(second.get_offsets()[:, 0] - 1) < 0.3).all()
    assert np.allclose(stars(axes), [(0, median), (1, 0.8)])
    assert ev.median_run(runs(values))["mig"] == median
    if len(good) % 2:
        assert median == np.median(good)
    assert axes.get_ylabel() == "MIG" and f"DeConv VAE\nn = {len(good)}" in texts(figure)
    assert repr(results) == repr(before)  # NaN is not equal to itself
    image = png.imread(tmp_path / "a.png")
    wanted = tuple(int(ev.BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert np.abs(pixel(figure, image, axes, (0, median)) - wanted).max() < 0.01  # a blue star


def test_models_without_a_value_are_left_out(tmp_path):
    figure = ev.scatter_figure({"A": runs([None, None]), "B": runs([0.1]), "C": []}, tmp_path / "a.png")
    assert len(scatters(figure.axes[0])) == 1 and "A\nn = 0" in texts(figure)
    assert ev.median_run(runs([None])) is None
    figure = ev.scatter_figure({"A": runs([320.0, 340.0], "elbo")}, tmp_path / "b.png", "elbo")
    assert figure.axes[0].get_ylim()[0] > 300


def linear(rgb):
    rgb = np.asarray(rgb)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """sRGB -> CIELAB, D65."""
    xyz = linear(rgb) @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.008856)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


# Machado, Oliveira and Fernandes (2009), severity 1: how protanopes and deuteranopes see linear RGB
PROTANOPIA = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]])
DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]])


def seen_by(matrix, rgb):
    seen = np.clip(linear(rgb) @ matrix.T, 0, 1)
    return lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("matrix", [np.eye(3), PROTANOPIA, DEUTERANOPIA])
def test_colours_differ_for_colour_blind_readers(matrix):
    def apart(colors):
        seen = seen_by(matrix, np.array(colors, float))
        return min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])

    rgb = lambda color: [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    blind = matrix[0, 0] < 1
    assert (apart([[0.8, 0.35, 0.0], [0.45, 0.55, 0.0]]) < 20) == blind  # the measure itself, on orange and green
    assert apart([*map(rgb, (ev.BLUE, ev.ORANGE, ev.GREEN, ev.PINK, ev.SKY, ev.RED, ev.YELLOW))]) > 15
    assert apart([rgb(ev.WORST), rgb(ev.BEST)]) > 40
    corners = ev.factor_colors([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert apart([*corners, [0, 0, 0], [1, 1, 1]]) > 35  # also from held-out black, and the paper's white
    # along both factors: never back to a colour that was there before
    line = np.stack([np.linspace(0, 1, 9), np.full(9, 0.5)], 1)
    for points in (line, line[:, ::-1]):
        seen = seen_by(matrix, ev.factor_colors(points))
        distance = np.linalg.norm(seen - seen[0], axis=1)
        assert (np.diff(distance) > 1).all()


def test_the_decoders_keep_their_colours():
    both = {"DeConv VAE": ev.BLUE, "Spatial Broadcast VAE": ev.ORANGE, "CoordConv VAE": ev.GREEN}
    assert ev.label_colors(both) == both
    assert ev.label_colors([*both][::-1]) == both
    assert ev.label_colors(["Broadcast VAE"]) == {"Broadcast VAE": ev.ORANGE}
    four = ev.label_colors(["DeConv VAE", "Broadcast VAE", "DeConv FactorVAE", "Broadcast FactorVAE"])
    assert len(set(four.values())) == 4 and [*four.values()][:2] == [ev.BLUE, ev.ORANGE]
    assert len(set(ev.label_colors([f"{n} layers" for n in range(7)]).values())) == 7
    assert len(ev.label_colors([str(i) for i in range(40)])) == 40


# ---------------------------------------------------------------------------------------------------- curves, trends


def sweep(offset, betas=(1.0, 0.4, 5.4, 2.0), replicas=4, seed=0):
    rng = np.random.default_rng(seed)
    return [dict(run=f"{offset}-{b}-{i}", config=dict(beta=b), nll=300 + 30 * np.log(b) + offset + rng.normal(),
                 kl=25 / b**0.5 + 0.3 * rng.normal(), mig=0.1 * b**0.5 + 0.01 * rng.random())
            for b in betas for i in range(replicas)]


def test_curves_are_means_and_hulls_of_one_std(tmp_path):
    results = {"DeConv VAE": sweep(20, seed=1), "Broadcast VAE": sweep(0)}
    results["DeConv VAE"] += [dict(config=dict(beta=1.0), nll=float("nan"), kl=1e9, mig=None, run="x")]
    figure = ev.curves_figure(results, tmp_path / "a.png")
    for axes, key, name in zip(figure.axes, ("kl", "mig"), ("KL (nats)", "MIG"), strict=True):
        assert axes.get_xlabel() == name and axes.get_ylabel() == "NLL (nats)"
        patches = [p for p in axes.patches if isinstance(p, PathPatch)]
        lines = [line for line in axes.lines if len(line.get_xydata()) == 4]
        assert len(patches) == len(lines) == 2
        ones = [line for line in axes.lines if len(line.get_xydata()) == 1]
        assert [line.get_markerfacecolor() for line in ones] == ["white"] * 2
        for (label, ms), patch, line, one in zip(results.items(), patches, lines, ones, strict=True):
            groups = {b: np.array([[m[key], m["nll"]] for m in ms if m["config"]["beta"] == b and m["nll"] == m["nll"]])
                      for b in (0.4, 1.0, 2.0, 5.4)}
            mean = np.array([g.mean(0) for g in groups.values()])
            std = np.array([g.std(0, ddof=1) for g in groups.values()])
            np.testing.assert_allclose(line.get_xydata(), mean)
            np.testing.assert_allclose(np.ravel(one.get_xydata()), mean[1])
            corners = patch.get_path().vertices
            np.testing.assert_allclose(corners.min(0), (mean - std).min(0))
            np.testing.assert_allclose(corners.max(0), (mean + std).max(0))
            outline = patch.get_path()
            for m, s in zip(mean, std, strict=True):
                for direction in np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):
                    assert outline.contains_point(m + 0.99 * s * direction), label
            for middle in (mean[1:] + mean[:-1]) / 2:
                assert outline.contains_point(middle)
            assert not outline.contains_point(mean[0] - 1.02 * std[0] * [0, 1])
    for text in ("DeConv VAE", "Broadcast VAE", "β = 1", "± one std", "β 0.4", "β 5.4"):
        assert text in texts(figure)
    # Where hulls of neighbouring betas overlap the shade is that of one, not of two
    image = png.imread(tmp_path / "a.png")[..., :3]
    blue = np.array([int(ev.BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    once, twice = (np.abs(image - (a * blue + 1 - a)).max(-1) < 0.01 for a in (0.25, 1 - 0.75**2))
    assert once.sum() > 500 and twice.sum() < 0.02 * once.sum()


def test_curves_of_single_runs_and_of_nothing(tmp_path):
    figure = ev.curves_figure({"A": sweep(0, replicas=1), "B": sweep(9, betas=(1.0,), replicas=3)}, tmp_path / "a.png")
    assert [len(line.get_xydata()) for line in figure.axes[0].lines] == [4, 1, 1, 1]
    assert not [p for p in figure.axes[0].patches if p.get_path().vertices.size]
    assert len(ev.curves_figure({"A": []}, tmp_path / "b.png").axes) == 2


def test_convex_hull():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(60, 2)), [[0, 0], [0, 0]]])
    hull = ev.convex_hull(points)
    assert {tuple(p) for p in hull} <= {tuple(p) for p in points}
    edges = np.roll(hull, -1, 0) - hull
    to = points[None] - hull[:, None]
    assert (edges[:, :1] * to[..., 1] - edges[:, 1:] * to[..., 0] >= -1e-12).all()  # all points left of all edges
    assert len(hull) > 5
    square = [(0, 0), (1, 0), (1, 1), (0, 1), (0.5, 0.5), (0.5, 0)]
    assert ev.convex_hull(square).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


def test_trend_is_mean_and_std_over_the_runs_at_each_step(tmp_path):
    rng = np.random.default_rng(0)
    a = [dict(run=f"a{s}", step=t, r2=rng.random(), mig=None, elbo=300 + rng.random()) for t in (300, 100, 200)
         for s in range(3)]
    a.append(dict(run="a0", step=400, r2=float("nan"), mig=None, elbo=310.0))
    b = [dict(run="b", step=t, r2=0.5, mig=None, elbo=320.0 - t / 100) for t in (100, 200)]
    log = [dict(run=m["run"], step=m["step"], elbo=m["elbo"], latents_used=4.0) for m in a]
    log.append(dict(run="a1", step=90, elbo=5000.0, latents_used=10.0))  # early: not to fill the picture
    results, logs = {"DeConv VAE": a, "Broadcast VAE": b}, {"DeConv VAE": log, "Broadcast VAE": b}
    figure = ev.trend_figure(results, logs, tmp_path / "a.png")
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "R² of the affine map", "NLL + KL (nats) in training", "latents used in training"]  # no run has a MIG
    axes = figure.axes[0]
    thick = [line for line in axes.lines if line.get_linewidth() > 1]
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert len(thick) == 2 and len(thin) == 3  # a single run is its mean
    at = {t: np.array([m["r2"] for m in a if m["step"] == t]) for t in (100, 200, 300)}
    np.testing.assert_allclose(thick[0].get_xydata(), [(t, v.mean()) for t, v in at.items()])
    for s, line in enumerate(thin):
        wanted = sorted((m["step"], m["r2"]) for m in a if m["run"] == f"a{s}" and m["r2"] == m["r2"])
        np.testing.assert_allclose(line.get_xydata(), wanted)
    band = axes.collections[0].get_paths()[0].vertices
    for t, v in at.items():
        ys = band[band[:, 0] == t, 1]
        np.testing.assert_allclose([ys.min(), ys.max()], [v.mean() - v.std(ddof=1), v.mean() + v.std(ddof=1)])
    assert "DeConv VAE (n = 3)" in texts(figure) and "Broadcast VAE (n = 1)" in texts(figure)
    assert "training steps" in texts(figure)
    elbo, latents = figure.axes[1:]
    assert elbo.lines[3].get_xydata()[:, 0].tolist() == [100, 200, 300]  # at 90 and 400 there is one of three runs
    assert elbo.lines[3].get_marker() == "" and len(elbo.lines[1].get_xydata()) == 4  # which thin lines show
    assert 300 < elbo.get_ylim()[1] < 330 and elbo.get_ylim()[0] < 300.99
    assert latents.get_ylim()[0] == 0 and latents.get_ylim()[1] > 10  # all of training, the collapse, too
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    for never in (b[:1], []):  # one of the models has no curve of evaluations, to compare with
        figure = ev.trend_figure(results | {"Broadcast VAE": never}, logs, tmp_path / "b.png")
        assert [axes.get_ylabel()[:4] for axes in figure.axes] == ["NLL ", "late"]
    for given in ({}, {"3": b}):  # the colours are those of the page's other figure
        legend = ev.trend_figure(given, {"2": b, "3": b}, tmp_path / "b.png").legends[0]
        assert [line.get_color() for line in legend.get_lines()] == [*ev.label_colors(["2", "3"]).values()]
    gone = results | {"all seeds diverged": []}
    assert len(ev.trend_figure(gone, logs | {"all seeds diverged": []}, tmp_path / "b.png").axes) == 3
    flat = {"A": [dict(run="a", step=s, elbo=3.0, latents_used=9.9 + s / 10) for s in (0, 1)]}
    assert ev.trend_figure({}, flat, tmp_path / "b.png").axes[1].get_ylim()[1] > 10.4  # 10 lies not on the frame
    single = {"A": [dict(run="a", step=5, elbo=3.0, latents_used=1.0)]}
    assert ev.trend_figure({}, single, tmp_path / "b.png").axes[0].lines[0].get_marker() != ""  # else it is not seen
    assert ev.trend_figure({"A": []}, {"A": []}, tmp_path / "c.png").axes  # nothing to show is no crash


# ------------------------------------------------------------------------------------------------------- geometry


def shape_of(f, shape=(8, 6), names=("x", "y"), hole=True, blank=None, shuffle=False):
    """What `geometry` gives, for codes f(factors)."""
    a, b = ((np.arange(n) + 0.5) / n for n in shape)
    factors = np.stack(np.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    if shuffle:
        factors = np.random.default_rng(3).permutation(factors)
    held = ((factors > 0.25) & (factors < 0.75)).all(1) & hole
    return dict(factors=factors, shape=shape, names=names, codes=np.asarray(f(factors), np.float32),
                latents=np.array([7, 4]), held_out=held, r2=0.98765, r2_held_out=0.5432 if hole else None, blank=blank)


def turned(factors):
    return factors @ np.array([[3.0, 1.0], [-1.0, 3.0]]) + [5, -2]


def replicas(migs, **more):
    return [dict(m, geometry=shape_of(lambda f, i=i: turned(f) + i, **more))
            for i, m in enumerate(runs(migs, r2=0.98765))]


SAMPLES = np.random.default_rng(0).random((16, 3, 12, 20)).astype(np.float32)


def test_geometry_shows_codes_worst_and_best(tmp_path):
    results = {"DeConv VAE": replicas([0.3, 0.1, None, 0.5]), "Broadcast VAE": replicas([0.85])}
    before = copy.deepcopy(results)
    figure = ev.geometry_figure(results, SAMPLES, tmp_path / "a.png")
    data, grid, samples, bars, worst, best, _, only, _ = figure.axes
    image = png.imread(tmp_path / "a.png")

    found = results["DeConv VAE"][0]["geometry"]
    held, outside = found["held_out"], ~found["held_out"]
    for axes, points in ((grid, found["factors"]), (worst, results["DeConv VAE"][1]["geometry"]["codes"]),
                         (best, results["DeConv VAE"][3]["geometry"]["codes"]),
                         (only, results["Broadcast VAE"][0]["geometry"]["codes"])):
        dots, = scatters(axes)
        np.testing.assert_allclose(dots.get_offsets(), points)
        colors = dots.get_facecolors()[:, :3]
        assert (colors[held] == 0).all() and colors[outside].max(1).min() > 0.3
        assert len(np.unique(colors[outside].round(6), axis=0)) == outside.sum()  # a colour for each place
        np.testing.assert_allclose(colors, scatters(grid)[0].get_facecolors()[:, :3])  # the same in all panels
        lines, = (c for c in axes.collections if isinstance(c, LineCollection))
        assert len(lines.get_segments()) == 7 * 6 + 8 * 5
        # neighbours are one step of the grid apart, whatever the map does
        points = np.asarray(points, float)
        for start, end in lines.get_segments():
            a, b = (found["factors"][np.abs(points - p).sum(1).argmin()] for p in (start, end))
            step = np.abs(a - b)
            assert np.allclose(sorted(step * [8, 6]), [0, 1])
        for point, color in zip(points, colors, strict=True):  # the pixel is where the axes say that it is
            assert np.abs(pixel(figure, image, axes, point) - color).max() < 0.02
    for axes in (worst, best, only):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("z7", "z4")
        assert np.isclose(np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim()))  # equal scales
        box = axes.get_window_extent()
        assert np.isclose(box.width, box.height, rtol=0.01)
    assert worst.get_title() == "worst MIG\nMIG 0.10, R² 0.988, held out 0.543"
    assert best.get_title() == "best MIG\nMIG 0.50, R² 0.988, held out 0.543"
    assert "MIG 0.85" in only.get_title()

    counts = [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    assert sum(counts) == 3 and len(counts) == 20
    for bar in bars.patches:
        low = bar.get_x()
        assert bar.get_height() == sum(low <= v < low + bar.get_width() for v in (0.3, 0.1, 0.5))
    assert np.allclose(sorted(x for x, _ in stars(bars)), [0.1, 0.5])
    assert [line.get_color() for line in bars.lines] == [ev.WORST, ev.BEST]
    assert worst.lines[0].get_color() == ev.WORST and best.lines[0].get_color() == ev.BEST
    assert bars.get_title() == "DeConv VAE" and "n = 4\nMIG 0.30 ± 0.20\nR² 0.988 ± 0.000" in texts(figure)

    drawn = scatters(data)[0].get_offsets()
    assert len(drawn) == 1500 and drawn.min() >= 0 and drawn.max() <= 1
    edges = found["factors"][held]
    low, high = edges.min(0) - [1 / 16, 1 / 12], edges.max(0) + [1 / 16, 1 / 12]
    assert not ((drawn > low + 1e-9) & (drawn < high - 1e-9)).all(1).any()  # the hole is empty
    cells = np.floor(drawn * [8, 6]).astype(int)
    assert len(np.unique(cells, axis=0)) == outside.sum()  # and the rest is not
    for axes in (data, grid):
        assert axes.get_xlabel() == "x (share of its range)" and axes.get_ylabel() == "y (share of its range)"
        assert axes.yaxis_inverted() and not axes.xaxis_inverted()
    tiles = samples.images[0].get_array()
    assert np.array_equal(tiles[1:13, 1:21], SAMPLES[0].transpose(1, 2, 0))
    assert np.array_equal(tiles[14 + 1 : 14 + 13, 22 + 1 : 22 + 21], SAMPLES[5].transpose(1, 2, 0))
    assert repr(results) == repr(before)


def test_geometry_with_one_run_each_is_one_plot_each(tmp_path):
    one = {"DeConv VAE": replicas([0.2], hole=False, names=("x", "hue"), blank=np.array([30.0, -2.0]))}
    figure = ev.geometry_figure(one, SAMPLES[:, :1], tmp_path / "a.png")
    assert len(figure.axes) == 4
    data, grid, samples, plot = figure.axes
    assert plot.get_title() == "DeConv VAE\nMIG 0.20, R² 0.988"
    assert not data.yaxis_inverted() and not grid.yaxis_inverted()
    dots, star = scatters(plot)
    assert np.array_equal(star.get_offsets(), [[30, -2]]) and (star.get_facecolors()[0, :3] == 0).all()
    assert plot.get_xlim()[1] > 30  # far away, and still in the picture
    assert not (dots.get_facecolors()[:, :3] == 0).all(1).any()
    image = png.imread(tmp_path / "a.png")
    assert (pixel(figure, image, plot, (30, -2)) < 0.05).all()
    assert "blank image" in texts(figure)
    figure = ev.geometry_figure({str(i): replicas([0.1 * i]) for i in range(5)}, SAMPLES, tmp_path / "b.png")
    assert sum(axes.axison for axes in figure.axes) == 2 + 5
    assert image.shape[1] == png.imread(tmp_path / "b.png").shape[1] == 1660


def test_geometry_of_odd_inputs(tmp_path):
    nothing = {"A": [dict(m, r2=None) for m in replicas([None, None])], "B": replicas([0.0, 0.0]), "C": []}
    figure = ev.geometry_figure(nothing, SAMPLES, tmp_path / "a.png")
    assert len(figure.axes) == 9 and "MIG –, R² 0.988" in figure.axes[4].get_title()
    collapsed = [dict(m, geometry=shape_of(np.zeros_like)) for m in runs([0.1, 0.2])]
    collapsed[0]["geometry"] |= dict(r2=0.0, r2_held_out=float("nan"))
    figure = ev.geometry_figure({"A": collapsed}, SAMPLES[:3], tmp_path / "b.png")
    assert "held out –" in figure.axes[4].get_title()
    only_extremes = {"A": [m if i != 1 else runs([0.2])[0] for i, m in enumerate(replicas([0.1, 0.2, 0.3]))]}
    ev.geometry_figure(only_extremes, SAMPLES, tmp_path / "c.png")  # the one in the middle needs no geometry
    for draw in (lambda path: ev.geometry_figure({"A": []}, SAMPLES, path), lambda path: ev.samples_figure({}, path)):
        with pytest.raises(sbvae.InputError, match="at least one run"):
            draw(tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()


def test_grid_lines_do_not_depend_on_the_order_of_the_points():
    ordered, mixed = shape_of(turned), shape_of(turned, shuffle=True)

    def segments(found):
        ends = found["factors"][ev.grid_lines(found["factors"])].round(6)
        return {frozenset(map(tuple, pair.tolist())) for pair in ends}

    assert segments(ordered) == segments(mixed) and len(segments(mixed)) == 7 * 6 + 8 * 5
    assert ev.grid_lines(np.array([[0.5, 0.5]])).shape == (0, 2)


# -------------------------------------------------------------------------------------------------- good manners


def test_a_failed_figure_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")
    figure = ev.new_figure()
    monkeypatch.setattr(figure, "savefig", lambda path, **_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ev.save_figure(figure, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def test_without_matplotlib_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sbvae.InputError, match="pip install matplotlib"):
        ev.scatter_figure({"A": runs([0.1])}, tmp_path / "a.png")


def test_no_window_and_no_global_state(tmp_path):
    """Importing eval doesn't import matplotlib, drawing neither imports pyplot nor changes rcParams."""
    code = f"""
import sys, eval as ev
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
ev.scatter_figure({{"A": [dict(mig=0.1), dict(mig=0.3)]}}, {str(tmp_path / "a.png")!r})
ev.curves_figure({{"A": [dict(mig=0.1, kl=1.0, nll=2.0, config=dict(beta=1.0))]}}, {str(tmp_path / "b.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    assert done.returncode == 0, done.stderr


def test_colours_of_a_grid_tell_the_factors_apart():
    """Blue to yellow along the first factor, dark to light along the second."""
    dark_blue, light_blue, brown, yellow = ev.factor_colors([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert all(c[2] > c[0] for c in (dark_blue, light_blue)) and all(c[0] > c[2] for c in (brown, yellow))
    assert light_blue.sum() > dark_blue.sum() + 0.5 and yellow.sum() > brown.sum() + 0.5
