"""Networks and losses against hand-derived counts, literal transcriptions and torch.distributions."""

import dataclasses
import json
import math

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D

import sbvae
from sbvae import Config


def count(module):
    return sum(p.numel() for p in module.parameters())


def conv(a, b):  # k = 4, also deconvolutions
    return 16 * a * b + b


def fc(a, b):
    return a * b + b


# Encoder: 64 -> 32 -> 16 -> 8 -> 4 rows, then FC 256 from 4 x 4 x 64 and FC 20 (Tables 1, 2).
ENCODER = conv(3, 64) + 3 * conv(64, 64) + fc(1024, 256) + fc(256, 20)
ENCODER_1 = conv(1, 64) + 3 * conv(64, 64) + fc(1024, 256) + fc(256, 20)
ENCODER_FACTOR = conv(3, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64) + fc(1024, 256) + fc(256, 20)
BROADCAST = conv(12, 64) + conv(64, 64) + conv(64, 3)
DECONV = fc(10, 256) + 4 * conv(64, 64) + conv(64, 3)
MID, OUT = conv(64, 64), conv(64, 3)

ROWS = [  # (where in the paper, config, encoder, decoder)
    ("Table 1 broadcast", {}, ENCODER, 81_027),
    ("Table 1 deconv", dict(decoder="deconv"), ENCODER, 268_291),
    ("Table 1 C=1", dict(dataset="chairs"), ENCODER_1, conv(12, 64) + MID + conv(64, 1)),
    ("Table 1 C=1 deconv", dict(dataset="chairs", decoder="deconv"), ENCODER_1, fc(10, 256) + 4 * MID + conv(64, 1)),
    ("Table 1 objects", dict(dataset="objects"), ENCODER, conv(12, 64) + 4 * MID + OUT),
    ("E coordconv", dict(decoder="coordconv"), ENCODER, fc(10, 256) + 4 * conv(66, 64) + conv(66, 3)),
    ("B shuffled", dict(shuffle_coords=True), ENCODER, BROADCAST),
    ("Table 2 broadcast", dict(model="factorvae"), ENCODER_FACTOR, BROADCAST),
    ("Table 2 deconv", dict(model="factorvae", decoder="deconv"), ENCODER_FACTOR,
     fc(10, 256) + 2 * MID + conv(64, 32) + conv(32, 32) + conv(32, 3)),
    ("Table 2 deconv, 3 layers (ours 8)", dict(model="factorvae", decoder="deconv", conv_layers=3), ENCODER_FACTOR,
     fc(10, 8 * 8 * 64) + conv(64, 32) + conv(32, 32) + conv(32, 3)),
    ("Table 2 deconv, 6 layers (ours 8)", dict(model="factorvae", decoder="deconv", conv_layers=6), ENCODER_FACTOR,
     fc(10, 64) + 3 * MID + conv(64, 32) + conv(32, 32) + conv(32, 3)),
    ("Table 5: 2", dict(conv_layers=2), ENCODER, conv(12, 64) + OUT),
    ("Table 5: 3", dict(conv_layers=3), ENCODER, BROADCAST),
    ("Table 5: 4", dict(conv_layers=4), ENCODER, BROADCAST + MID),
    ("Table 5: 5", dict(conv_layers=5), ENCODER, BROADCAST + 2 * MID),
    ("Table 6: 3", dict(decoder="deconv", conv_layers=3), ENCODER, fc(10, 8 * 8 * 64) + 2 * MID + OUT),
    ("Table 6: 4", dict(decoder="deconv", conv_layers=4), ENCODER, fc(10, 4 * 4 * 64) + 3 * MID + OUT),
    ("Table 6: 5", dict(decoder="deconv", conv_layers=5), ENCODER, DECONV),
    ("Table 6: 6", dict(decoder="deconv", conv_layers=6), ENCODER, fc(10, 64) + 5 * MID + OUT),
    ("Table 7: 1", dict(mlp_layers=1), ENCODER, fc(10, 256) + conv(258, 64) + MID + OUT),
    ("Table 7: 2", dict(mlp_layers=2), ENCODER, fc(10, 256) + fc(256, 256) + conv(258, 64) + MID + OUT),
    ("Table 7: 3", dict(mlp_layers=3), ENCODER, fc(10, 256) + 2 * fc(256, 256) + conv(258, 64) + MID + OUT),
    ("Table 8: 1", dict(decoder="deconv", mlp_layers=1), ENCODER, DECONV),
    ("Table 8: 2", dict(decoder="deconv", mlp_layers=2), ENCODER, DECONV + fc(256, 256)),
    ("Table 8: 3", dict(decoder="deconv", mlp_layers=3), ENCODER, DECONV + 2 * fc(256, 256)),
    ("Table 7: 0", dict(mlp_layers=0), ENCODER, BROADCAST),
    ("Table 9: 0", dict(dataset="objects", conv_layers=3, mlp_layers=0), ENCODER, BROADCAST),
    ("Table 9: 1", dict(dataset="objects", conv_layers=3, mlp_layers=1), ENCODER,
     fc(10, 256) + conv(258, 64) + MID + OUT),
    ("Table 9: 2", dict(dataset="objects", conv_layers=3, mlp_layers=2), ENCODER,
     fc(10, 256) + fc(256, 256) + conv(258, 64) + MID + OUT),
    ("Table 9: 3", dict(dataset="objects", conv_layers=3, mlp_layers=3), ENCODER,
     fc(10, 256) + 2 * fc(256, 256) + conv(258, 64) + MID + OUT),
    ("Table 10: 0", dict(upscales=0), ENCODER, BROADCAST),
    ("Table 10: 1", dict(upscales=1), ENCODER, BROADCAST),  # a deconvolution has as many weights
    ("Table 10: 2", dict(upscales=2), ENCODER, BROADCAST),
    ("Table 10: 3", dict(upscales=3), ENCODER, BROADCAST),
]


@pytest.mark.parametrize("config, encoder, decoder", [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_every_row_of_the_tables(config, encoder, decoder):
    """Exact parameter counts; shapes forward, a gradient for every weight backward, steps lower the loss."""
    model = sbvae.build_model(Config(**config))
    assert (count(model.encoder), count(model.decoder)) == (encoder, decoder)
    c = model.config
    shape = (2, 1 if c.dataset == "chairs" else 3, 64, 64)
    images = 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(0))  # dark: easy to improve on
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr)
    for _ in range(4):
        out = model(images, torch.Generator().manual_seed(1))
        assert out.logits.shape == images.shape and out.mu.shape == out.logvar.shape == out.z.shape == (2, 10)
        loss = sbvae.vae_loss(out.logits, images, out.mu, out.logvar)[0]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("model", ["vae", "factorvae"])
@pytest.mark.parametrize("decoder", ["broadcast", "deconv", "coordconv"])
def test_one_training_step(decoder, model, likelihood, tmp_path):
    config = Config(decoder=decoder, model=model, likelihood=likelihood, steps=1, batch_size=2, precision="fp32",
                    device="cpu", out=str(tmp_path / "run"))
    record = sbvae.train(config)
    assert all(math.isfinite(v) for v in record.values()) and record["step"] == 1
    assert ("tc" in record) == (model == "factorvae")


def test_defaults_are_the_papers():
    def get(**config):
        c = sbvae.resolve(Config(**config))
        return c.steps, c.batch_size, c.lr, c.beta, c.gamma, c.latents, c.conv_layers, c.mlp_layers

    assert get() == (1_500_000, 16, 3e-4, 1, 0, 10, 3, 0)  # A.1, Tables 1 and 4
    assert get(decoder="deconv") == (1_500_000, 16, 3e-4, 1, 0, 10, 5, 1)
    assert get(model="factorvae") == (1_000_000, 32, 1e-4, 1, 35, 10, 3, 0)  # A.2, Table 4
    assert get(dataset="circles-xy:blank", model="factorvae")[0] == get(dataset="circles-xyh-tiny")[0] == 500_000
    assert get(dataset="chairs")[0] == 700_000
    assert (get(dataset="objects")[0], get(dataset="objects")[6]) == (2_500_000, 6)
    ours = sbvae.resolve(Config(device="cpu"))
    assert (ours.likelihood, ours.seed, ours.log_every, ours.save_every) == ("bernoulli", 0, 200, 5000)
    assert sbvae.resolve(Config(device="cuda:0")).save_every == 50_000


# ------------------------------------------------------------------------------------------- broadcast, padding


def algorithm_1(z, height, width):
    """Algorithm 1 for one latent vector, in NumPy as printed (height, width, channels), line 3 with h for w."""
    z_b = np.tile(z, (height, width, 1))
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    x_b, y_b = np.meshgrid(x, y)
    return np.concatenate([z_b, x_b[..., None], y_b[..., None]], axis=-1)


def test_spatial_broadcast_is_algorithm_1():
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = sbvae.spatial_broadcast(z, 5, 7)
    expected = torch.from_numpy(np.stack([algorithm_1(v, 5, 7) for v in z.numpy()])).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)
    x, y = ours[0, 4], ours[0, 5]
    assert (x[0, 0], x[0, -1], x[-1, 0]) == (-1, 1, -1)  # x runs along the width
    assert (y[0, 0], y[0, -1], y[-1, 0]) == (-1, -1, 1)  # y down the height
    with pytest.raises(AssertionError):  # negative control: swapped coordinates are told apart
        torch.testing.assert_close(ours[:, [0, 1, 2, 3, 5, 4]], expected, atol=1e-7, rtol=0)


def tensorflow_same(x, weight, bias, stride):
    """TensorFlow's definition, one output at a time: out = ceil(n / s), pad = max((out - 1) s + k - n, 0),
    the smaller half of it before."""
    k, (h, w) = weight.shape[2], x.shape[2:]
    rows, columns = math.ceil(h / stride), math.ceil(w / stride)
    top, left = (max((o - 1) * stride + k - n, 0) // 2 for o, n in ((rows, h), (columns, w)))
    out = torch.zeros(len(x), len(weight), rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            for a in range(k):
                for b in range(k):
                    r, c = i * stride + a - top, j * stride + b - left
                    if 0 <= r < h and 0 <= c < w:
                        out[:, :, i, j] += x[:, :, r, c] @ weight[:, :, a, b].T
    return out + bias[:, None, None]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 6), (7, 10), (5, 9), (1, 3)])
def test_same_padding_is_tensorflows(size, stride):
    generator = torch.Generator().manual_seed(0)
    layer = sbvae.SameConv2d(2, 3, 4, stride=stride).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator)
    expected = tensorflow_same(x, layer.weight, layer.bias, stride)
    torch.testing.assert_close(layer(x), expected)
    if stride == 1:  # negative control: 2 before and 1 after
        wrong = F.conv2d(F.pad(x, (2, 1, 2, 1)), layer.weight, layer.bias)
        assert not torch.allclose(wrong, expected)


def test_deconvolution_is_tensorflows():
    """TensorFlow defines conv2d_transpose as the gradient of conv2d; ours must be that of `tensorflow_same`."""
    layer = sbvae.deconv(2, 3).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(2, 3, 6, 10, dtype=torch.float64, requires_grad=True)
    forward = tensorflow_same(image, layer.weight, torch.zeros(2, dtype=torch.float64), 2)
    (expected,) = torch.autograd.grad(forward, image, x)
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], expected)


def test_decoder_is_the_literal_one():
    """Values and gradients of encoder and broadcast decoder against tests/naive.py, at H != W."""
    model = sbvae.build_model(Config(image_shape=[3, 48, 32]))
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # biases start at zero: a dropped one must be seen
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    x = torch.rand(3, 3, 48, 32, generator=generator)
    out = model(x, torch.Generator().manual_seed(5))
    noise = torch.randn(3, 10, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad(sbvae.vae_loss(out.logits, x, out.mu, out.logvar)[0], list(weights.values()))
    torch.testing.assert_close(out.logits, naive.decode(weights, out.z, 48, 32), atol=1e-5, rtol=1e-4)
    theirs = torch.autograd.grad(naive.loss(weights, x, noise), list(weights.values()))
    for name, a, b in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-3, msg=name)
    wrong = naive.decode(weights, out.z, 32, 48).mT
    assert not torch.allclose(out.logits, wrong, atol=1e-2)  # negative control: height and width mixed up


def test_without_kernels_the_same(monkeypatch):
    if sbvae.broadcast_conv2d is None:
        pytest.skip("kernels/ is not there: there is one path only")
    for config in ({}, dict(mlp_layers=1), dict(shuffle_coords=True), dict(conv_layers=1)):
        model = sbvae.build_model(Config(image_shape=[3, 10, 6], kernel="torch", **config))  # not "auto": factorised
        z = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        with_kernels = model.decode(z)
        with monkeypatch.context() as patch:
            patch.setattr(sbvae, "broadcast_conv2d", None)
            torch.testing.assert_close(model.decode(z), with_kernels, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [{}, dict(decoder="deconv"), dict(decoder="coordconv"), dict(upscales=2),
                                    dict(mlp_layers=2), dict(model="factorvae", decoder="deconv", conv_layers=3)])
def test_any_size_channels_and_latents(config):
    model = sbvae.build_model(Config(image_shape=[2, 32, 96], latents=3, **config))
    x = torch.rand(2, 2, 32, 96)
    out = model(x)
    assert out.logits.shape == x.shape and out.z.shape == (2, 3)


def test_odd_sizes_where_the_layers_allow():
    assert sbvae.build_model(Config(image_shape=[1, 37, 51]))(torch.rand(2, 1, 37, 51)).logits.shape == (2, 1, 37, 51)


def test_upscales_shrink_the_tile():
    for upscales, rows in enumerate((64, 32, 16, 8)):  # Table 10
        decoder = sbvae.build_model(Config(upscales=upscales)).decoder
        assert decoder.coords.shape == (2, rows, rows)
        kinds = [isinstance(layer, torch.nn.ConvTranspose2d) for layer in decoder.convs]
        assert kinds == [True] * upscales + [False] * (3 - upscales)  # from the tile on


def test_shuffled_coordinates():
    """Appendix B: a permutation of the pairs; fixed; different for another seed; in the state dict."""
    grid = sbvae.coordinate_grid(64, 64).flatten(1).T
    model, again, other = (sbvae.build_model(Config(shuffle_coords=True, seed=s)) for s in (0, 0, 1))
    pairs = model.decoder.coords.flatten(1).T
    assert torch.equal(torch.unique(pairs, dim=0), torch.unique(grid, dim=0))
    assert len(torch.unique(pairs, dim=0)) == 4096
    assert (pairs == grid).all(1).sum() < 20  # about one stays where it was
    assert torch.equal(model.decoder.coords, again.decoder.coords)
    assert not torch.equal(model.decoder.coords, other.decoder.coords)
    assert torch.equal(model.state_dict()["decoder.coords"], model.decoder.coords)
    plain = sbvae.build_model(Config(seed=0))
    plain.load_state_dict(model.state_dict())
    z = torch.randn(2, 10)
    assert torch.equal(plain.decode(z), model.decode(z))  # the checkpoint carries the permutation


def test_coordconv_sees_coordinates_at_every_layer():
    decoder = sbvae.build_model(Config(decoder="coordconv")).decoder
    assert [layer.in_channels for layer in decoder.convs] == [66] * 5
    z = torch.randn(1, 10)
    before = decoder(z)
    for layer in decoder.convs:  # cutting the coordinates of any one layer changes the image
        saved = layer.weight.data.clone()
        layer.weight.data[64:] = 0
        assert not torch.allclose(decoder(z), before)
        layer.weight.data.copy_(saved)
    h = torch.zeros(1, 1, 2, 3)
    expected = torch.tensor([[[-1.0, 0, 1], [-1, 0, 1]], [[-1.0, -1, -1], [1, 1, 1]]])
    assert torch.equal(sbvae.append_coords(h)[0, 1:], expected)


def test_initialisation():
    """Truncated normal at 2 sigma, sigma = 1 / sqrt(fan in), zero biases."""
    for config in ({}, dict(decoder="deconv", model="factorvae")):
        for name, p in sbvae.build_model(Config(**config)).named_parameters():
            if name.endswith("bias"):
                assert not p.any()
                continue
            transposed = name.startswith("decoder.convs") and config
            fan_in = p.shape[0 if transposed else 1] * p[0, 0].numel()
            scaled = (p * fan_in**0.5).detach().flatten()
            assert scaled.abs().max() <= 2 + 1e-4
            if p.numel() > 5000:
                # the variance of a normal cut at a = 2: 1 - 2 a phi(a) / (2 Phi(a) - 1)
                phi, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(2 / math.sqrt(2))
                assert scaled.var().item() == pytest.approx(1 - 4 * phi / mass, rel=0.06)
                assert abs(scaled.mean().item()) < 0.05 and scaled.abs().max() > 1.95


def test_autocast_keeps_latents_in_fp32():
    model = sbvae.build_model(Config())
    x = torch.rand(2, 3, 64, 64)
    exact = model(x, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, torch.Generator().manual_seed(0))
    assert {t.dtype for t in low} == {torch.float32}
    assert not torch.equal(low.mu, low.mu.bfloat16().float())  # not rounded on the way
    for a, b in zip(low, exact, strict=True):
        assert (a - b).norm() / b.norm() < 0.03


@pytest.mark.parametrize("upscales, alone", [(0, True), (1, False), (2, False)])
def test_autocast_does_not_round_what_enters_a_plain_first_layer(upscales, alone, monkeypatch):
    """Where the factorised layer is not there, or is none: 2 and 2.003 are one number in bf16."""
    if alone:
        monkeypatch.setattr(sbvae, "broadcast_conv2d", None)
    decoder, seen = sbvae.build_model(Config(upscales=upscales)).decoder, []
    decoder.convs[0].register_forward_hook(lambda _, __, out: seen.append(out))
    z = torch.tensor([2.0, 2.003]).expand(10, 2).T.contiguous()
    exact = decoder(z)
    with torch.autocast("cpu", torch.bfloat16):
        low = decoder(z)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[1][0], seen[1][1])
    assert 0 < (low - exact).norm() / exact.norm() < 0.03  # the other layers are in bf16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_first_layer_takes_latents_of_any_type(dtype):
    model, z = sbvae.build_model(Config(upscales=1)), torch.randn(2, 10)
    exact = model.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.decode(z.to(dtype)) - exact).norm() / exact.norm() < 0.03
    assert (model.to(dtype).decode(z) - exact).norm() / exact.norm() < 0.03


# --------------------------------------------------------------------------------------------------------- losses


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, images, mu, logvar = (torch.randn(*shape, dtype=torch.float64, generator=generator)
                                  for shape in [(5, 3, 4, 6)] * 2 + [(5, 7)] * 2)
    return logits, images.sigmoid(), mu, logvar


def test_losses_against_distributions():
    logits, images, mu, logvar = batch()
    kl = D.kl_divergence(D.Normal(mu, (0.5 * logvar).exp()), D.Normal(0, 1)).sum(1).mean()
    gaussian = -D.Normal(logits, math.sqrt(0.3)).log_prob(images).sum((1, 2, 3)).mean()
    binary = images.round()
    bernoulli = -D.Bernoulli(logits=logits).log_prob(binary).sum((1, 2, 3)).mean()
    continuous = -D.Bernoulli(logits=logits, validate_args=False).log_prob(images).sum((1, 2, 3)).mean()
    for beta in (0.0, 1.0, 4.0):
        for x, likelihood, nll in ((images, "gaussian", gaussian), (binary, "bernoulli", bernoulli),
                                   (images, "bernoulli", continuous)):
            ours = sbvae.vae_loss(logits, x, mu, logvar, beta, likelihood)
            torch.testing.assert_close(torch.stack(ours), torch.stack([nll + beta * kl, nll, kl]))
    deviation = -D.Normal(logits, 0.3).log_prob(images).sum((1, 2, 3)).mean()
    assert not torch.isclose(gaussian, deviation)  # 0.3 is the variance, not the deviation
    with pytest.raises(ValueError, match="match"):
        sbvae.vae_loss(logits, images.mT, mu, logvar)


def test_pixels_of_each_likelihood():
    logits = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    p = [1 / (1 + math.exp(-v)) for v in logits.tolist()]
    for likelihood, expected in (("bernoulli", p), ("gaussian", [0, 0, 0.3, 1])):
        model = sbvae.build_model(Config(likelihood=likelihood, conv_layers=1, image_shape=[1, 8, 8]))
        torch.testing.assert_close(model.pixels(logits), torch.tensor(expected, dtype=torch.float32))


def test_reparameterize():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2 * math.log(0.1)]])
    z = sbvae.reparameterize(mu.expand(40_000, -1), logvar.expand(40_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 0.1]), atol=0, rtol=0.02)


def test_factorvae_losses_by_hand():
    """D(z) = P(class 0) is the chance that z is from q(z), so E log D / (1 - D) = E (logit 0 - logit 1)."""
    joint = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    permuted = torch.tensor([[0.0, 1.0], [4.0, 4.0]])
    assert sbvae.total_correlation(joint).item() == pytest.approx(((2 - 0) + (1 - 3)) / 2)
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]  # D of the joint samples
    q = [1 - 1 / (1 + math.exp(1)), 1 / 2]  # 1 - D of the permuted ones
    by_hand = -0.5 * (sum(map(math.log, p)) / 2 + sum(map(math.log, q)) / 2)
    assert sbvae.discriminator_loss(joint, permuted).item() == pytest.approx(by_hand)
    assert sbvae.discriminator_loss(permuted, joint).item() != pytest.approx(by_hand)  # labels the other way round
    good = torch.tensor([[9.0, -9.0]])
    assert sbvae.discriminator_loss(good, -good) < 1e-6 and sbvae.total_correlation(good) > 0


def test_permutation_keeps_every_marginal_and_breaks_the_joint():
    z = torch.arange(64.0)[:, None].expand(-1, 5) + 1000 * torch.arange(5)  # all latents move together
    shuffled = sbvae.permute_latents(z, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.sort(0).values, z.sort(0).values)
    assert not torch.equal(shuffled, z)
    rows = shuffled - 1000 * torch.arange(5)
    assert (rows == rows[:, :1]).all(1).sum() < 3  # each on its own: rows do not stay together
    many = torch.stack([sbvae.permute_latents(z[:4, :1], torch.Generator().manual_seed(s)) for s in range(4000)])
    counts = torch.stack([(many[:, i, 0] == j).sum() for i in range(4) for j in range(4)]).float()
    assert ((counts - 1000).square() / 1000).sum() < 45  # uniform over positions


def test_discriminator():
    discriminator = sbvae.build_discriminator(10)
    assert count(discriminator) == fc(10, 1000) + 5 * fc(1000, 1000) + fc(1000, 2)
    slopes = [m.negative_slope for m in discriminator if isinstance(m, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * 6
    assert discriminator(torch.randn(4, 10)).shape == (4, 2)


def test_discriminator_finds_the_total_correlation_of_a_gaussian():
    """Two latents with correlation 0.8: TC = -log(1 - rho^2) / 2 = 0.511 nats."""
    rho, generator = 0.8, torch.Generator().manual_seed(0)
    discriminator = sbvae.build_discriminator(2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9))

    def sample(n):
        z = torch.randn(n, 2, generator=generator)
        return torch.stack([z[:, 0], rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]], 1)

    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / 120)  # settle: the estimate is noisy at a constant rate
        loss = sbvae.discriminator_loss(discriminator(sample(256)),
                                        discriminator(sbvae.permute_latents(sample(256), generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        estimate = sbvae.total_correlation(discriminator(sample(20_000))).item()
    assert estimate == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.1)


# ------------------------------------------------------------------------------------------------- bad configurations


@pytest.mark.parametrize("config, words", [
    (dict(decoder="deconv", shuffle_coords=True), "--shuffle-coords"),
    (dict(decoder="coordconv", upscales=1), "--upscales"),
    (dict(upscales=4), "--upscales 4"),
    (dict(gamma=35.0), "--gamma"),
    (dict(decoder="deconv", mlp_layers=0), "--mlp-layers"),
    (dict(decoder="deconv", kernel="torch"), "--kernel"),
    (dict(upscales=1, kernel="torch"), "--kernel"),
    (dict(model="factorvae", batch_size=1), "--batch-size"),
    (dict(decoder="deconv", conv_layers=7), "--conv-layers"),
    (dict(upscales=3, image_shape=[3, 60, 64]), "--upscales"),
    (dict(upscales=3, image_shape=[3, 64, 60]), "--upscales"),
    (dict(decoder="deconv", image_shape=[3, 64, 48]), "--conv-layers"),
    (dict(decoder="conv"), "broadcast, deconv, coordconv"),
    (dict(beta=-1.0), "--beta"), (dict(beta=math.nan), "--beta"), (dict(lr=0.0), "--lr"), (dict(lr=math.inf), "--lr"),
    (dict(latents=True), "--latents"), (dict(shuffle_coords="no"), "--shuffle-coords"), (dict(dataset=5), "--dataset"),
    (dict(decoder="deconv", conv_layers=20_000), "--conv-layers"), (dict(image_shape=[3, 64]), "image_shape"),
    (dict(latents=0), "--latents"), (dict(latents=2.5), "--latents"), (dict(seed=-1), "--seed"),
    (dict(steps=0), "--steps"), (dict(batch_size=0), "--batch-size"), (dict(conv_layers=0), "--conv-layers"),
    (dict(save_every=0), "--save-every"),
])
def test_impossible_configurations_are_refused(config, words):
    with pytest.raises(sbvae.InputError, match=words) as error:
        sbvae.build_model(Config(**config))
    assert "\n" not in str(error.value)


def test_every_beta_from_zero():
    assert sbvae.resolve(Config(beta=0.0)).beta == 0 and sbvae.resolve(Config(beta=5.4)).beta == 5.4


def test_config_survives_json():
    c = sbvae.resolve(Config(image_shape=[3, 64, 64]))
    assert Config(**json.loads(json.dumps(dataclasses.asdict(c)))) == c
