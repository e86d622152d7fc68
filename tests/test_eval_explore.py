"""The explorer's window, headless: events go in through PyGame's queue, and its pixels are compared with the images
that the latents mean, decoded here in float64 without the model's code."""

import json
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import gen_circles
import sbvae

pygame = gen_circles.import_pygame()
K, H, W = 3, 24, 40


def plain_decode(model, z):
    """Algorithm 1 and Table 1 in float64: (K,) -> (H, W, C) in [0, 1]."""
    channels, height, width = model.config.image_shape
    x, y = (-1 + 2 * torch.arange(n).double() / (n - 1) for n in (width, height))
    tiles = [v.double().expand(height, width) for v in torch.as_tensor(z)]
    h = torch.stack([*tiles, x.expand(height, width), y[:, None].expand(height, width)])[None]
    weights = list(model.decoder.convs.state_dict().values())
    for i in range(0, len(weights), 2):
        h = F.conv2d(F.pad(F.relu(h) if i else h, (1, 2, 1, 2)), weights[i].double(), weights[i + 1].double())
    return h.sigmoid()[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose latents all matter to the image, the second one the most to the posterior, then the third."""
    folder = tmp_path_factory.mktemp("explore")
    np.savez(folder / "data.npz", images=np.random.default_rng(0).integers(0, 256, (50, H, W, 3), dtype=np.uint8))
    sbvae.train(sbvae.Config(dataset=str(folder / "data.npz"), latents=K, conv_layers=2, steps=1, batch_size=2,
                             device="cpu", precision="fp32", out=str(folder / "run")))
    checkpoint = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    for name, value in checkpoint["model"].items():
        value *= 4 if name.startswith("decoder.convs") and name.endswith("weight") else 1
    checkpoint["model"]["encoder.latents.weight"][:K] *= 20  # means that differ from image to image
    checkpoint["model"]["encoder.latents.bias"][:] = torch.tensor([0.3, -1.2, 0.8, -1, -6, -3])
    torch.save(checkpoint, folder / "run/checkpoint.pt")
    return folder / "run"


@pytest.fixture
def display(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    surface = evaluation.open_window("test")
    yield surface
    pygame.quit()


@pytest.fixture
def state(run, display):
    model, data, step = evaluation.open_run(run, "cpu")
    return evaluation.start_explorer(model, data, "test", {1: "hue"}, images=20)


@torch.no_grad()
def encode(state):
    mean, logvar = state.model.encode(state.image)
    return mean[0], logvar[0]


def press(*keys):
    return [pygame.event.Event(kind, key=key) for key in keys for kind in (pygame.KEYDOWN, pygame.KEYUP)]


def mouse(*points):
    """Press at the first point, move to the others, release."""
    kinds = [pygame.MOUSEBUTTONDOWN] + [pygame.MOUSEMOTION] * (len(points) - 1) + [pygame.MOUSEBUTTONUP]
    return [pygame.event.Event(kind, pos=pos, button=1, buttons=(1, 0, 0), rel=(0, 0))
            for kind, pos in zip(kinds, [*points, points[-1]])]


def frame(state, events=(), run=None):
    """The window, (height, width, 3) int, after these events went through PyGame's queue and the loop."""
    for event in (*events, pygame.event.Event(pygame.QUIT)):
        pygame.event.post(event)
    state.running = True
    evaluation.play(state, pygame.display.get_surface(), run)
    return pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1).astype(int)


def shown(window, column, height=H, width=W):
    """The image in the window, (height, width, 3), shrunk again, having checked that its pixels are squares."""
    left, top, w, h = evaluation.panel(column, height, width)
    n = w // width
    assert (w, h) == (n * width, n * height) and n == min(320 // width, 320 // height)
    pixels = window[top: top + h, left: left + w]
    small = pixels[::n, ::n]
    assert (pixels == small.repeat(n, 0).repeat(n, 1)).all()
    return small


def knob(window, row, rows=K):
    """Column of the middle of the row's knob, read below the rail."""
    y = 64 + min(44, (640 - 64 - 24) // rows) * row + min(44, (640 - 64 - 24) // rows) // 2 + 3
    colors = [evaluation.CHOSEN, evaluation.INK, evaluation.DIM]
    columns = [x for x in range(905, 1135) if tuple(window[y, x]) in colors]
    assert 3 <= len(columns) <= 15 and columns[-1] - columns[0] == len(columns) - 1, (row, columns)
    return (columns[0] + columns[-1]) / 2


def assert_shows(window, state, z):
    """The sliders show z and the picture is what z means."""
    expected = plain_decode(state.model, z) * 255
    assert abs(shown(window, 1) - expected).max() < 0.6
    for row, k in enumerate([1, 2, 0]):
        assert abs(knob(window, row) - (920 + 200 * (float(z[k]) + 3) / 6)) <= 1.5
    for i, j in ((0, 1), (0, 2), (1, 2)):  # another order of the latents would have been seen
        swapped = list(map(float, z))
        swapped[i], swapped[j] = swapped[j], swapped[i]
        if abs(swapped[i] - swapped[j]) > 0.3:
            assert abs(plain_decode(state.model, swapped) * 255 - expected).max() > 5


def test_opens_with_an_image_at_its_posterior_mean_and_sorted_sliders(state):
    assert state.order == [1, 2, 0]
    window = frame(state)
    image = (shown(window, 0) / 255).transpose(2, 0, 1)[None]
    torch.testing.assert_close(torch.tensor(image).float(), state.image, atol=1e-6, rtol=0)
    mean, logvar = encode(state)
    assert_shows(window, state, mean.tolist())
    torch.testing.assert_close(state.deviation, logvar.exp().sqrt())


def test_sliders_follow_the_mouse(state):
    middle = [86, 130, 174]
    window = frame(state, [*mouse((1000, middle[0]), (500, middle[0])),  # dragged off the left end
                           *mouse((1095, middle[1])),
                           *mouse((1000, middle[2]), (1300, middle[2] + 200), (970, middle[2] + 200))])
    # rows are latents 1, 2, 0; columns 920 to 1120 are -3 to 3
    z = [-3 + 6 * 50 / 200, -3, -3 + 6 * 175 / 200]
    torch.testing.assert_close(state.z, torch.tensor(z))
    assert_shows(window, state, z)
    assert state.row == 2 and not state.dragging
    frame(state, mouse((1300, middle[0])))  # beside a slider: chosen, not moved
    frame(state, mouse((300, middle[1])))  # on the image: nothing
    frame(state, [pygame.event.Event(pygame.MOUSEMOTION, pos=(1000, middle[2]), buttons=(0, 0, 0), rel=(0, 0)),
                  pygame.event.Event(pygame.MOUSEBUTTONDOWN, pos=(1000, middle[2]), button=3)])
    torch.testing.assert_close(state.z, torch.tensor(z))
    assert state.row == 0


def test_arrows_choose_and_nudge(state):
    before = state.z.clone()
    window = frame(state, press(pygame.K_DOWN, pygame.K_RIGHT, pygame.K_RIGHT, pygame.K_UP, pygame.K_LEFT, pygame.K_UP))
    expected = before + torch.tensor([0, -0.1, 0.2])
    torch.testing.assert_close(state.z, expected)
    assert state.row == 2  # round the end
    assert_shows(window, state, expected)
    state.z[0] = 2.97
    frame(state, press(pygame.K_RIGHT))
    assert state.z[0] == 3
    state.z[0] = -4.5  # a posterior mean may lie beyond the slider, and does not jump
    frame(state, press(pygame.K_LEFT))
    assert state.z[0] == -4.5
    frame(state, press(pygame.K_RIGHT))
    assert state.z[0].item() == pytest.approx(-4.4)


def test_a_held_key_repeats_only_for_arrows(state):
    down = lambda key: pygame.event.Event(pygame.KEYDOWN, key=key)
    z, image = state.z.clone(), state.image
    frame(state, [down(pygame.K_RIGHT)] * 5)
    assert (state.z[1] - z[1]).item() == pytest.approx(0.5)
    frame(state, [down(pygame.K_SPACE)] * 2)  # the second would stop it
    assert state.sweeping
    frame(state, [down(pygame.K_n)])
    second = state.image
    frame(state, [down(pygame.K_n), down(pygame.K_n)])
    assert state.image is second and not torch.equal(second, image)
    frame(state, [pygame.event.Event(pygame.KEYUP, key=pygame.K_n), down(pygame.K_n)])
    assert state.image is not second


def test_new_image_reset_and_prior(state):
    images = [state.image]
    for _ in range(2):
        window = frame(state, press(pygame.K_n))
        assert not any(torch.equal(state.image, image) for image in images)
        images.append(state.image)
        np.testing.assert_allclose(shown(window, 0) / 255, state.image[0].permute(1, 2, 0), atol=1e-6)
        assert_shows(window, state, encode(state)[0].tolist())
    mean = state.mean.clone()
    window = frame(state, press(pygame.K_p))
    assert (state.z - mean).abs().min() > 1e-3 and torch.equal(state.mean, mean)
    assert_shows(window, state, state.z.tolist())
    draws = []
    for _ in range(300):
        for event in press(pygame.K_p):
            evaluation.handle_event(state, event)
        draws.append(state.z)
    draws = torch.stack(draws)
    assert draws.mean().abs() < 4 / 30 and abs(draws.var().item() - 1) < 4 * math.sqrt(2 / 900)  # N(0, 1)
    window = frame(state, press(pygame.K_r))
    assert_shows(window, state, mean.tolist())
    torch.testing.assert_close(state.z, mean)
    frame(state, press(pygame.K_RIGHT))
    torch.testing.assert_close(state.mean, mean)  # the sliders do not move what R returns to


def test_sweep(state):
    before = state.z.clone()
    frame(state, press(pygame.K_SPACE))
    assert state.sweeping and (state.z - before).abs().max() < 0.5  # it starts from where the latent is
    path = []
    for _ in range(80):
        evaluation.advance_sweep(state, 0.05)
        path.append(state.z[1].item())
        assert torch.equal(state.z[[0, 2]], before[[0, 2]])
    assert min(path) == pytest.approx(-2, abs=0.01) and max(path) == pytest.approx(2, abs=0.01)
    assert max(abs(a - b) for a, b in zip(path, path[1:])) < 0.2
    assert path[-1] == pytest.approx(path[0], abs=0.2)  # 4 seconds there and back
    evaluation.draw_window(pygame.display.get_surface(), state)
    window = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1).astype(int)
    assert_shows(window, state, [before[0], path[-1], before[2]])

    frame(state, press(pygame.K_DOWN))  # the next latent is swept, this one returns
    assert state.sweeping and state.z[1] == before[1]
    evaluation.advance_sweep(state, 0.5)
    assert state.z[2] != before[2]
    frame(state, press(pygame.K_SPACE))  # stops where it is
    stopped = state.z.clone()
    evaluation.advance_sweep(state, 0.5)
    assert torch.equal(state.z, stopped) and stopped[2] != before[2] and not state.sweeping
    frame(state, press(pygame.K_SPACE, pygame.K_r))
    assert torch.equal(state.z, before) and not state.sweeping
    for stop in (mouse((1000, 130)), press(pygame.K_LEFT)):
        frame(state, [*press(pygame.K_SPACE), *stop])
        assert not state.sweeping


def test_the_loop_animates_a_sweep(state):
    seen, decode = [], state.model.decode

    def watched(z):
        seen.append(z[0, 1].item())
        if len(seen) == 6:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return decode(z)

    state.model.decode = watched
    for event in press(pygame.K_SPACE):
        pygame.event.post(event)
    pygame.time.set_timer(pygame.QUIT, 20_000, 1)  # should it stand still
    evaluation.play(state, pygame.display.get_surface(), None)
    pygame.time.set_timer(pygame.QUIT, 0)
    assert len(seen) == 7 and len(set(seen)) == 7


@pytest.mark.parametrize("event", [*press(pygame.K_q)[:1], *press(pygame.K_ESCAPE)[:1],
                                   pygame.event.Event(pygame.QUIT)])
def test_quits(state, event):
    evaluation.handle_event(state, event)
    assert not state.running


def test_decodes_only_when_a_latent_moved(state):
    calls, decode = [], state.model.decode
    state.model.decode = lambda z: (calls.append(z), decode(z))[1]
    surface = pygame.display.get_surface()
    for _ in range(3):
        evaluation.draw_window(surface, state)
    assert len(calls) == 1
    frame(state, press(pygame.K_DOWN))
    assert len(calls) == 1
    frame(state, press(pygame.K_RIGHT))
    assert len(calls) == 2


def test_saves_the_window_and_overwrites_nothing(state, tmp_path):
    (tmp_path / "explore-1.png").write_bytes(b"mine")
    frame(state, press(pygame.K_s, pygame.K_RIGHT), tmp_path)
    window = frame(state, press(pygame.K_s), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"explore-{n}.png" for n in (1, 2, 3)]
    assert (tmp_path / "explore-1.png").read_bytes() == b"mine"
    assert (tmp_path / "explore-3.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    saved = pygame.surfarray.array3d(pygame.image.load(tmp_path / "explore-3.png")).swapaxes(0, 1).astype(int)
    assert_shows(saved, state, state.z.tolist())
    assert (saved[50:] == window[50:]).all()  # all but the line that then says where it is
    assert state.message == "saved explore-3.png" and (saved[:50] != window[:50]).any()
    frame(state, press(pygame.K_LEFT))
    assert state.message == ""
    frame(state, press(pygame.K_s), tmp_path / "gone")  # nothing is lost
    assert state.message.startswith("not saved: No such file") and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("shape, latents", [((3, 24, 40), 1), ((1, 96, 40), 30), ((3, 64, 64), 10), ((2, 17, 5), 31),
                                            ((3, 320, 16), 2)])
def test_any_size(display, shape, latents):
    model = sbvae.build_model(sbvae.Config(image_shape=list(shape), latents=latents, conv_layers=1)).eval()
    data = types.SimpleNamespace(sample=lambda n, generator: torch.rand(n, *shape, generator=generator))
    state = evaluation.start_explorer(model, data, "a title that is far too long " * 9,
                                      {0: "a factor with a very long name"}, images=8)
    window = frame(state, press(*[pygame.K_DOWN] * min(latents, 30)))
    assert state.row == 0
    channels = [0, 1, 2] if shape[0] == 3 else [0, 0, 0]
    np.testing.assert_allclose(shown(window, 0, *shape[1:]) / 255, state.image[0, channels].permute(1, 2, 0), atol=2e-3)
    expected = plain_decode(model, state.z)[:, :, channels] * 255
    assert abs(shown(window, 1, *shape[1:]) - expected).max() < 0.6
    rows = min(latents, 30)
    assert len(state.order) == rows
    for row, k in enumerate(state.order):
        assert abs(knob(window, row, rows) - (1020 + 100 * state.z[k].item() / 3)) <= 1.5
    height = min(44, (640 - 64 - 24) // rows)
    frame(state, mouse((920, 64 + height * (rows - 1) + 1)))
    assert state.row == rows - 1 and state.z[state.order[-1]] == -3


def test_a_large_image_is_shrunk(display):
    model = sbvae.build_model(sbvae.Config(image_shape=[3, 16, 400], latents=2, conv_layers=1)).eval()
    data = types.SimpleNamespace(sample=lambda n, generator: torch.full((n, 3, 16, 400), 0.6))
    window = frame(evaluation.start_explorer(model, data, images=1))
    assert evaluation.panel(0, 16, 400) == (24, 64 + 153, 320, 13)
    assert (window[217:230, 24:344] == 153).all() and (window[231:, 24:344] != 153).any()


def test_diverged(display):
    model = sbvae.build_model(sbvae.Config(latents=2))
    model.encoder.latents.bias.data[3] = math.inf
    data = types.SimpleNamespace(sample=lambda n, generator: torch.rand(n, 3, 64, 64))
    with pytest.raises(sbvae.InputError, match="diverged"):
        evaluation.start_explorer(model, data, images=2)


def test_explore(run, monkeypatch):
    """The whole of it: the window opens on the run, is saved, and closes; PyGame is put away."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    steps, opened = [], []

    def user():
        while not (pygame.display.get_init() and pygame.display.get_surface()) and time.time() < start + 60:
            time.sleep(0.01)
        opened.append(pygame.display.get_caption()[0])
        for event in press(pygame.K_RIGHT, pygame.K_s):
            pygame.event.post(event)
        while not (run / "explore-1.png").exists() and time.time() < start + 60:
            time.sleep(0.01)
        steps.append((run / "explore-1.png").exists())
        pygame.event.post(pygame.event.Event(pygame.QUIT))

    start = time.time()
    thread = threading.Thread(target=user)
    thread.start()
    evaluation.explore(run, "cpu")
    thread.join()
    assert opened == ["run, step 1"] and steps == [True] and not pygame.display.get_init()
    model, data, _ = evaluation.open_run(run, "cpu")
    state = evaluation.start_explorer(model, data)
    saved = pygame.surfarray.array3d(pygame.image.load(run / "explore-1.png")).swapaxes(0, 1).astype(int)
    assert_shows(saved, state, (state.mean + torch.tensor([0, 0.1, 0])).tolist())
    (run / "explore-1.png").unlink()


def test_names_of_factors(run):
    assert evaluation.named_factors(run, 1) == {}  # never evaluated
    keys = "run config elbo nll nll_floor kl latents_used mig mig_sampled factor_vae r2 r2_held_out estimator"
    sound = dict.fromkeys(keys.split(), 1.0) | dict(run="r", config={}, estimator={}, step=1)
    latents = [dict(index=1, variance=0.1, factor="x", information=1.0),
               dict(index=0, variance=0.9, factor=None, information=0.0)]
    (run / "metrics.json").write_text(json.dumps(sound | dict(latents=latents)))
    assert evaluation.named_factors(run, 1) == {1: "x"}
    assert evaluation.named_factors(run, 2) == {}  # of an older checkpoint
    (run / "metrics.json").write_text("{")
    assert evaluation.named_factors(run, 1) == {}
    (run / "metrics.json").unlink()


@pytest.fixture
def one_line(monkeypatch, capfd):
    """Calls the command line without a display; it must end with code 2 and one line, which is returned."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            evaluation.main([*map(str, arguments)])
        out, err = capfd.readouterr()
        assert end.value.code == 2 and not out
        assert len(err.splitlines()) == 1 and err.startswith("error: ")
        return err

    return call


def test_a_run_that_is_not_there(one_line, tmp_path):
    assert "holds no run" in one_line("--explore", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a window may open")
def test_no_display(one_line, run):
    assert "no display" in one_line("--explore", run)


def test_without_pygame(one_line, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    assert "pip install pygame" in one_line("--explore", run)


def test_a_display_that_does_not_answer(monkeypatch):
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setenv("DISPLAY", ":987")
    monkeypatch.setattr(pygame.display, "init", lambda: None)
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")  # SDL's choice then
    with pytest.raises(sbvae.InputError, match="no display"):
        evaluation.open_window("test")


def test_a_sweep_returns_to_the_image_that_is_shown(state):
    frame(state, press(pygame.K_SPACE, pygame.K_n))
    evaluation.advance_sweep(state, 0.7)
    assert state.sweeping and state.row == 0
    mean = encode(state)[0]
    assert (state.z[1] - mean[1]).abs() > 0.01
    frame(state, press(pygame.K_DOWN))
    assert state.z[1] == mean[1]


def test_latents_without_a_slider_are_the_least_informative(display):
    model = sbvae.build_model(sbvae.Config(latents=33, conv_layers=1)).eval()
    width = np.random.default_rng(0).permutation(33)
    with torch.no_grad():
        model.encoder.latents.weight[33:] = 0
        model.encoder.latents.bias[33:] = torch.from_numpy(-0.2 * width).float()
    data = types.SimpleNamespace(sample=lambda n, generator: torch.rand(n, 3, 64, 64, generator=generator))
    assert evaluation.start_explorer(model, data, images=2).order == np.argsort(-width)[:30].tolist()


def test_each_row_tells_its_own_latent(state, monkeypatch):
    """Its name, factor, variance and value, and in blue this image's posterior."""
    written = []

    def spies(fonts=evaluation.explorer_fonts):
        return {size: types.SimpleNamespace(render=lambda text, *a, font=font: written.append(text) or font.render(
            text, *a)) for size, font in fonts().items()}

    monkeypatch.setattr(evaluation, "explorer_fonts", spies)
    mean, logvar = encode(state)
    state.factors = {1: "hue", 0: "x"}
    state.z = torch.tensor([3.0, -3, 2.9])  # out of the way of the blue line
    window = frame(state)
    values = {0: "+3.00", 1: "-3.00", 2: "+2.90"}
    wanted = [(f"z{k}", state.factors.get(k, ""), f"{state.variance[k]:.4f}", values[k]) for k in (1, 2, 0)]
    assert [tuple(written[i : i + 4]) for i in range(len(written) - 12, len(written), 4)] == wanted
    assert "z1 = -3.00, tells most about hue" in written
    for row, k in enumerate((1, 2, 0)):
        blue = np.flatnonzero((window[64 + 44 * row + 22] == evaluation.SPREAD).all(1))
        for end, sign in ((blue.min(), -1), (blue.max(), 1)):
            value = max(-3, min(3, (mean[k] + sign * (0.5 * logvar[k]).exp()).item()))
            assert abs(end - (920 + 200 * (value + 3) / 6)) <= 1.5 or value > 2.5


def test_explore_tells_the_factors_of_metrics_json(run, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "open_window", lambda title: None)
    monkeypatch.setattr(evaluation, "play", lambda state, *_: shown.append(state.factors))
    monkeypatch.setattr(evaluation, "named_factors", lambda path, step: {2: f"{path.name} {step}"})
    evaluation.explore(run, "cpu")
    assert shown == [{2: "run 1"}]


def test_the_variances_shown_are_means_over_the_images(state):
    with torch.no_grad():
        images = state.data.sample(20, torch.Generator().manual_seed(0))
        expected = state.model.encode(images)[1].exp().mean(0)
    torch.testing.assert_close(torch.tensor(state.variance), expected)


def test_a_sweep_in_the_loop_takes_four_seconds(state, monkeypatch):
    """A frame of 40 ms, a hundredth of it; one of a second, when the machine sleeps, counts as a tenth."""
    phases, ticks = [], iter([0, 40, 40, 1000])
    monkeypatch.setattr(pygame.time, "Clock", lambda: types.SimpleNamespace(tick=lambda fps: next(ticks)))

    def draw(_, state):
        phases.append(state.phase)
        state.running = len(phases) < 4

    monkeypatch.setattr(evaluation, "draw_window", draw)
    evaluation.start_sweep(state)
    evaluation.play(state, pygame.display.get_surface(), None)
    np.testing.assert_allclose(np.diff(phases) * 4 / (2 * math.pi), [0.04, 0.04, 0.1])
