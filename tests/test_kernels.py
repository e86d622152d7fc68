"""The torch form of kernels/broadcast_conv.py against the layer written out, in float64.

`python -m pytest tests/test_kernels.py`; SBVAE_SLOW=1 sweeps more shapes. The Triton form is tested
in test_kernels_triton.py, which takes its cases and its comparator from here.
"""

import copy
import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import SpatialBroadcastConv2d, bench, broadcast_conv2d, coordinates

SLOW = os.environ.get("SBVAE_SLOW") == "1"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# --- cases and comparator -------------------------------------------------------------------------


def random_case(rng):
    """Sizes and options of one call; about one in eight has no output and is skipped by callers."""
    sizes = dict(
        batch=rng.choice([0, 1, 2, 3]),
        latents=rng.choice([1, 2, 5]),
        maps=rng.choice([1, 2, 4]),
        channels=rng.choice([1, 2, 3, 5]),
        height=rng.choice([1, 2, 3, 5, 8, 11]),
        width=rng.choice([1, 2, 4, 7, 9]),
        kernel=(rng.choice([1, 2, 3, 4, 5]), rng.choice([1, 2, 3, 4])),
        bias=rng.random() < 0.7,
    )
    options = dict(
        padding=rng.choice(["same", "same", "valid", 0, 1, (2, 0), (1, 3), 6]),
        activation=rng.choice([None, "relu", "elu"]),
        coords_first=rng.random() < 0.5,
        out_format=rng.choice(list(LAYOUTS)),
    )
    return sizes, options


def tensors(sizes, seed=0, dtype=torch.float64, device="cpu"):
    """z, coords, weight (and bias) of these sizes; random coordinates, as any content will do."""
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (sizes["batch"], sizes["latents"]),
        (sizes["maps"], sizes["height"], sizes["width"]),
        (sizes["channels"], sizes["latents"] + sizes["maps"], *sizes["kernel"]),
    ]
    shapes += [(sizes["channels"],)] if sizes.get("bias", True) else []
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


def has_output(sizes, padding):
    kernel, image = sizes["kernel"], (sizes["height"], sizes["width"])
    if padding == "same":
        return True
    pair = (0, 0) if padding == "valid" else padding
    pair = (pair, pair) if isinstance(pair, int) else pair
    return all(n + 2 * p >= k for n, p, k in zip(image, pair, kernel, strict=True))


def with_gradients(arguments, upstream=None, **options):
    """[output, *gradients of all arguments] for a random upstream gradient."""
    out = broadcast_conv2d(*arguments, **options)
    if upstream is None:
        g = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=g)
    return [out, *torch.autograd.grad(out, arguments, upstream.to(out))]


def assert_as_exact(actual, reference, exact):
    """`actual` is at most twice as far from `exact` (float64) as `reference`, plus one ulp.

    Gradients, sums of thousands of terms that cancel, get four ulps: in float32 the reference's own
    error varies by that much with the order of its sums.
    """
    for i, (a, r, e) in enumerate(zip(actual, reference, exact, strict=True)):
        assert a.shape == e.shape and a.dtype == r.dtype, f"{i}: {a.shape} {a.dtype}"
        if e.numel() == 0:
            continue
        a, r, ulp = a.detach().cpu(), r.detach().cpu(), torch.finfo(a.dtype).eps * e.abs().max()
        allowed = 2 * (r.double() - e).abs().max() + (1 if i == 0 else 4) * ulp
        error = (a.double() - e).abs().max()
        assert error <= allowed, f"result {i} is off by {error:.3g}, allowed {allowed:.3g}"


def exact(arguments, **options):
    """Values and gradients of the reference in float64, on a CPU, for these very numbers."""
    double = [t.detach().cpu().double().requires_grad_() for t in arguments]
    return [t.detach() for t in with_gradients(double, **{**options, "backend": "reference"})]


# --- the reference itself -------------------------------------------------------------------------


def test_reference_is_the_sum_written_out():
    """Every output value by loops over channels and taps: tile, append, pad, correlate."""
    sizes = dict(batch=2, latents=2, maps=2, channels=2, height=3, width=5, kernel=(4, 3))
    z, coords, weight, bias = (t.detach() for t in tensors(sizes))
    out = broadcast_conv2d(z, coords, weight, bias, backend="reference")
    assert out.shape == (2, 2, 3, 5)
    for b, c, y, x in itertools.product(range(2), range(2), range(3), range(5)):
        total = bias[c].item()
        for k, i, j in itertools.product(range(4), range(4), range(3)):
            yy, xx = y + i - 1, x + j - 1  # k=4 "same": one row of zeros before, two after
            if 0 <= yy < 3 and 0 <= xx < 5:
                value = z[b, k] if k < 2 else coords[k - 2, yy, xx]
                total += (weight[c, k, i, j] * value).item()
        assert abs(out[b, c, y, x].item() - total) < 1e-12


def test_same_padding_is_tensorflows():
    """A kernel of ones counts the taps inside the image: for k=4 "same", 3 first and 2 last."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    coords, weight = torch.zeros(1, 6, 7).double(), torch.zeros(1, 2, 4, 4).double()
    weight[:, 0] = 1
    counts = broadcast_conv2d(ones, coords, weight, backend="torch")[0, 0]
    rows, columns = torch.tensor([3, 4, 4, 4, 3, 2]), torch.tensor([3, 4, 4, 4, 4, 3, 2])
    assert torch.equal(counts, torch.outer(rows, columns).double())


def test_coordinates_follow_algorithm_1():
    """x first, along the width; y second, along the height; both from -1 to 1."""
    x, y = coordinates(3, 5)
    assert x.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0]] * 3
    assert y.tolist() == [[-1.0] * 5, [0.0] * 5, [1.0] * 5]


# --- the torch form -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1000 if SLOW else 120))
def test_torch_equals_reference(seed):
    sizes, options = random_case(random.Random(seed))
    if not has_output(sizes, options["padding"]):
        with pytest.raises(ValueError, match="larger than the padded"):
            broadcast_conv2d(*tensors(sizes), **options)
        return
    arguments = tensors(sizes, seed)
    actual = with_gradients(arguments, backend="torch", **options)
    wanted = with_gradients(arguments, backend="reference", **options)
    assert actual[0].is_contiguous(memory_format=LAYOUTS[options["out_format"]])
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", [None, "relu", "elu"])
@pytest.mark.parametrize("kernel, padding", [((4, 3), "same"), ((2, 3), "valid"), ((3, 1), (1, 2))])
def test_first_and_second_derivatives(activation, kernel, padding):
    sizes = dict(batch=2, latents=2, maps=1, channels=2, height=3, width=4, kernel=kernel)
    for layout in LAYOUTS:

        def layer(*t, layout=layout):
            return broadcast_conv2d(
                *t, padding=padding, activation=activation, backend="torch", out_format=layout
            )

        assert torch.autograd.gradcheck(layer, tensors(sizes))
        assert torch.autograd.gradgradcheck(layer, tensors(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_in_low_precision(dtype, layout):
    sizes = dict(batch=5, latents=6, maps=2, channels=8, height=13, width=17, kernel=(4, 4))
    for activation in (None, "relu", "elu"):
        options = dict(activation=activation, out_format=layout)
        arguments = tensors(sizes, dtype=dtype)
        assert_as_exact(
            with_gradients(arguments, backend="torch", **options),
            with_gradients(arguments, backend="reference", **options),
            exact(arguments, **options),
        )


def wrong_answers(arguments, **options):
    """What a broken kernel would give."""
    z, coords, weight, bias = arguments
    right = broadcast_conv2d(*arguments, **options)
    yield "zeros", torch.zeros_like(right)
    yield "x and y swapped", broadcast_conv2d(z, coords.flip(0), weight, bias, **options)
    yield "bias dropped", broadcast_conv2d(z, coords, weight, None, **options)
    yield "kernel transposed", broadcast_conv2d(z, coords, weight.transpose(2, 3), bias, **options)
    yield "padding off by one", right.roll((1, 1), (2, 3))
    # two rows of zeros before and one after: what F.conv2d's "same" would be if rounded up
    flipped = broadcast_conv2d(z, coords.flip(1, 2), weight.flip(2, 3), bias, **options)
    yield "padding on the other side", flipped.flip(2, 3)
    yield "one image for all", right[:1].expand_as(right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparator_rejects_wrong_answers(dtype):
    sizes = dict(batch=3, latents=4, maps=2, channels=4, height=7, width=9, kernel=(4, 4))
    arguments = tensors(sizes, dtype=dtype)
    wanted = exact(arguments)[:1]
    reference = [broadcast_conv2d(*arguments, backend="reference")]
    assert_as_exact([broadcast_conv2d(*arguments, backend="torch")], reference, wanted)
    for name, wrong in wrong_answers(arguments, backend="torch"):
        with pytest.raises(AssertionError, match="off by"):
            assert_as_exact([wrong], reference, wanted)
            pytest.fail(f"accepted: {name}")


def test_strided_and_expanded_inputs():
    sizes = dict(batch=4, latents=3, maps=2, channels=3, height=6, width=5, kernel=(3, 4))
    z, coords, weight, bias = (t.detach() for t in tensors(sizes))
    strided = [z.t().contiguous().t(), coords.mT.contiguous().mT, weight.flip(2).flip(2), bias]
    strided[0] = strided[0][:1].expand(4, -1)
    wanted = broadcast_conv2d(strided[0].contiguous(), coords, weight, bias, backend="reference")
    torch.testing.assert_close(broadcast_conv2d(*strided, backend="torch"), wanted)


def test_expanded_upstream_gradient():
    """`.sum().backward()` hands down a gradient with strides of zero."""
    sizes = dict(batch=3, latents=2, maps=2, channels=2, height=5, width=6, kernel=(3, 3))
    for layout in LAYOUTS:
        options = dict(activation="relu", out_format=layout)
        grads = [
            torch.autograd.grad(broadcast_conv2d(*t, backend=b, **options).sum(), t)
            for b in ("torch", "reference")
            for t in [tensors(sizes)]
        ]
        torch.testing.assert_close(*grads)


def saved_by(layer, z):
    """What the layer's output is, and the bytes by storage that are kept for its backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(z)
    return out, {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}


@pytest.mark.parametrize("maps", [2, 24])
def test_saves_no_activations(maps):
    """For the backward pass the torch form keeps what does not grow with the batch, and z."""
    coords = torch.rand(maps, 32, 40)
    layer = SpatialBroadcastConv2d(4, 16, 4, 32, 40, activation="relu", backend="torch", coords=coords)
    out, stored = saved_by(layer, torch.randn(64, 4, requires_grad=True))
    assert 0 < sum(stored.values()) < out.numel() * out.element_size() / 16


@pytest.mark.parametrize("activation", ["relu", "elu", None])
def test_in_bfloat16_only_the_output_of_a_relu_is_saved(activation):
    layer = SpatialBroadcastConv2d(4, 16, 4, 32, 40, activation=activation, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        out, stored = saved_by(layer, torch.randn(64, 4, requires_grad=True))
    own = stored.pop(out.untyped_storage().data_ptr(), 0)
    assert own == (out.numel() * out.element_size() if activation == "relu" else 0)
    assert 0 < sum(stored.values()) < out.numel() * out.element_size() / 8


def test_autocast_gives_the_half_type_and_float32_gradients():
    layer = SpatialBroadcastConv2d(5, 8, 4, 9, 12, activation="relu", backend="torch")
    z = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(z)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert z.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(z), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 64])
def test_auto_agrees_on_both_sides_of_its_threshold(batch):
    sizes = dict(batch=batch, latents=6, maps=2, channels=8, height=16, width=24, kernel=(4, 4))
    arguments = [t.detach() for t in tensors(sizes)]
    layouts = [
        broadcast_conv2d(*arguments, activation="relu", out_format=layout, backend=backend)
        for layout in LAYOUTS
        for backend in ("auto", "reference")
    ]
    for out in layouts[:-1]:
        torch.testing.assert_close(out, layouts[-1])
    assert layouts[2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("coords_first", [False, True])
@pytest.mark.parametrize("batch", [1, 64])
def test_auto_does_not_round_latents_under_autocast(batch, coords_first):
    """On both sides of its threshold; near 2 bfloat16 has steps of 1/64."""
    sizes = dict(batch=batch, latents=6, maps=2, channels=8, height=16, width=24, kernel=(4, 4))
    z, coords, weight, bias = (t.detach().float() for t in tensors(sizes))
    arguments = (2 + z / 100).requires_grad_(), coords, weight, bias, "same", "relu"
    exact = broadcast_conv2d(*(a.double() for a in arguments[:4]), *arguments[4:], "reference", coords_first)
    with torch.autocast("cpu", torch.bfloat16):
        out = broadcast_conv2d(*arguments, coords_first=coords_first)
        plain = broadcast_conv2d(*arguments, "reference", coords_first)
    assert out.dtype == plain.dtype == torch.bfloat16
    rounded_once = dict(rtol=2**-8, atol=1e-4)
    assert torch.allclose(out.double(), exact, **rounded_once)
    assert not torch.allclose(plain.double(), exact, **rounded_once)
    (grad,) = torch.autograd.grad(out, arguments[0], torch.ones_like(out))
    (right,) = torch.autograd.grad(exact, arguments[0], torch.ones_like(exact))
    torch.testing.assert_close(grad.double(), right.double(), rtol=1e-2, atol=1e-2 * right.abs().max().item())


@pytest.mark.parametrize("size", [16, 64])
def test_vmap_under_autocast(size):
    """Which it leaves out: what follows is in float32, and so must be what this layer gives it."""
    layer, after = SpatialBroadcastConv2d(6, 8, 4, size, size, activation="relu"), nn.Conv2d(8, 3, 4)
    z = torch.randn(64, 6)
    expected = after(layer(z))
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.func.vmap(lambda one: after(layer(one[None]))[0])(z)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# --- module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, padding", [(4, "same"), ((3, 5), "same"), (3, "valid"), (3, 1)])
def test_module_replaces_nn_conv2d(kernel, padding):
    """Same state dict, same initialisation from the same seed, same output."""
    torch.manual_seed(3)
    conv = nn.Conv2d(5 + 2, 4, kernel, padding=padding)
    torch.manual_seed(3)
    ours = SpatialBroadcastConv2d(
        5, 4, kernel, 6, 9, padding=padding, activation="relu", backend="torch"
    )
    assert list(ours.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), conv.parameters(), strict=True))
    with torch.no_grad():
        conv.weight.mul_(2)
    ours.load_state_dict(conv.state_dict())
    z = torch.randn(3, 5)
    tiled = z[:, :, None, None].expand(-1, -1, 6, 9)
    image = torch.cat([tiled, coordinates(6, 9).expand(3, -1, -1, -1)], 1)
    wanted = F.relu(conv(image))
    torch.testing.assert_close(ours(z), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(ours)(z), wanted, rtol=1e-5, atol=1e-5)


def test_module_takes_any_coordinates_and_moves_them():
    coords = torch.rand(4, 5, 7)
    layer = SpatialBroadcastConv2d(
        3, 2, 5, 5, 7, coords=coords, coords_first=True, bias=False, backend="torch"
    )
    assert layer.weight.shape == (2, 7, 5, 5) and layer.bias is None
    layer = layer.double()
    z = torch.randn(2, 3, dtype=torch.float64)
    wanted = broadcast_conv2d(
        z, coords.double(), layer.weight, backend="reference", coords_first=True
    )
    torch.testing.assert_close(layer(z), wanted)
    with pytest.raises(ValueError, match=r"coords must be a tensor \(M, 6, 7\)"):
        SpatialBroadcastConv2d(3, 2, 5, 6, 7, coords=coords)


class TheirDecoder(nn.Module):
    """The conventions of published decoders, in the words of their code: tile, coordinates, convolution."""

    def __init__(self, coords, first, add=False, coords_first=False):
        super().__init__()
        self.coords, self.first, self.add, self.coords_first = coords, first, add, coords_first
        self.rest = nn.Conv2d(first.out_channels, 3, 1)

    def forward(self, z):
        tiled = z[:, :, None, None].repeat(1, 1, *self.coords.shape[1:])
        coords = self.coords.repeat(len(z), 1, 1, 1)  # of (M,H,W)
        both = [coords, tiled] if self.coords_first else [tiled, coords]
        image = tiled + coords if self.add else torch.cat(both, 1)
        return self.rest(F.relu(self.first(image)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_recipes_for_published_decoders(backend):
    """README's table: how each convention is written with this layer."""
    torch.manual_seed(0)
    f64, how = dict(dtype=torch.float64), dict(backend=backend)
    (height, width), z = (6, 9), torch.randn(4, 5, **f64)
    y, x = torch.linspace(-1, 1, height, **f64)[:, None].expand(6, 9), torch.linspace(-1, 1, width, **f64).expand(6, 9)

    def layer(theirs, **options):
        options = dict(kernel_size=3, height=height, width=width, activation="relu") | options
        ours = SpatialBroadcastConv2d(5, 8, **options, **how, **f64)
        ours.load_state_dict(theirs.first.state_dict())
        return ours

    theirs = TheirDecoder(torch.stack([y, x]), nn.Conv2d(7, 8, 3, padding=1, **f64)).double()
    ours = layer(theirs, coords=coordinates(height, width).flip(0))
    torch.testing.assert_close(theirs.rest(ours(z)), theirs(z))  # y before x
    wrong = layer(theirs)
    assert not torch.allclose(theirs.rest(wrong(z)), theirs(z))  # negative control

    four = torch.stack([x, y, -x, -y]) / 2 + 0.5
    theirs = TheirDecoder(four, nn.Conv2d(9, 8, 3, padding=1, **f64)).double()
    slots = torch.stack([z, z.flip(0)], 1)  # (B, slots, K)
    flat = slots.flatten(0, 1)
    torch.testing.assert_close(theirs.rest(layer(theirs, coords=four)(flat)), theirs(flat))

    theirs = TheirDecoder(torch.stack([x, y]), nn.Conv2d(7, 8, 3, padding=1, **f64), coords_first=True).double()
    torch.testing.assert_close(theirs.rest(layer(theirs, coords_first=True)(z)), theirs(z))

    theirs = TheirDecoder(torch.stack([x, y]), nn.Conv2d(7, 8, 3, **f64)).double()
    ours = layer(theirs, padding="valid", activation=None)
    sequence = nn.Sequential(nn.Identity(), ours, nn.ReLU(), theirs.rest)
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert list(sequence.state_dict()) == names and sequence(z).shape == (4, 3, height - 2, width - 2)
    torch.testing.assert_close(sequence(z), theirs(z))  # a larger canvas, unpadded, in a Sequential

    conv = nn.Conv2d(7, 8, (3, 5), padding=(1, 2), **f64)
    theirs = TheirDecoder(torch.stack([x, y]), conv).double()
    h = broadcast_conv2d(z, coordinates(height, width).to(z), conv.weight, conv.bias, conv.padding, "relu", **how)
    torch.testing.assert_close(theirs.rest(h), theirs(z))  # a size that only forward knows

    conv, pos = nn.Conv2d(5, 8, 5, padding=2, **f64), torch.randn(5, height, width, requires_grad=True, **f64)
    theirs, w = TheirDecoder(pos, conv, add=True).double(), conv.weight
    h = broadcast_conv2d(z, pos, torch.cat([w, w], 1), conv.bias, conv.padding, "relu", **how)
    results = [(out, *torch.autograd.grad(out.square().sum(), [pos, w, conv.bias]))
               for out in (theirs.rest(h), theirs(z))]
    torch.testing.assert_close(*results)  # a position embedding, added

    conv = nn.ConvTranspose2d(7, 8, 5, padding=1, **f64)
    theirs, w = TheirDecoder(torch.stack([x, y]), conv).double(), conv.weight
    h = broadcast_conv2d(z, theirs.coords, w.transpose(0, 1).flip(2, 3), conv.bias, 5 - 1 - 1, "relu", **how)
    torch.testing.assert_close(theirs.rest(h), theirs(z))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_and_exports_in_one_graph(layout):
    layer = SpatialBroadcastConv2d(
        3, 4, 4, 6, 9, activation="relu", backend="torch", out_format=layout
    )
    z = torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [
        (out, *torch.autograd.grad(out.square().sum(), [z, layer.weight, layer.bias]))
        for out in (layer(z), compiled(z))
    ]
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (z.detach(),), dynamic_shapes=({0: batch},))
    other = torch.randn(8, 3)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_a_gradient_penalty_under_autocast(activation):
    """Whose second derivative flows through sums in float32 of gradients in bfloat16."""
    sizes = dict(batch=3, latents=2, maps=2, channels=3, height=5, width=7, kernel=(4, 3))
    exact = tensors(sizes)
    upstream = torch.randn(3, 3, 5, 7).bfloat16()

    def derivatives(arguments, upstream, backend, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = broadcast_conv2d(*arguments, activation=activation, backend=backend)
        first = torch.autograd.grad(out, arguments, upstream, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), arguments[:3])

    expected = derivatives(exact, upstream.double(), "reference", False)
    found = derivatives([t.detach().float().requires_grad_() for t in exact], upstream, "torch", True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_batches_of_gradients(activation, layout):
    """autograd.grad(..., is_grads_batched=True), as jacobian and hessian do it with vectorize=True, and torch.vmap."""
    sizes = dict(batch=3, latents=2, maps=2, channels=3, height=5, width=7, kernel=(4, 3))
    arguments = tensors(sizes)
    stack = torch.randn(4, 3, 3, 5, 7, dtype=torch.float64)

    def layer(*arguments, backend):
        return broadcast_conv2d(*arguments, activation=activation, out_format=layout, backend=backend)

    def derivatives(backend):
        out = layer(*arguments, backend=backend)
        loss = lambda z: layer(z, *arguments[1:], backend=backend).pow(3).sum()
        hessian = torch.autograd.functional.hessian(loss, arguments[0], vectorize=True)
        batched = torch.autograd.grad(out, arguments, stack, is_grads_batched=True, retain_graph=True)
        mapped = torch.vmap(lambda g: torch.autograd.grad(out, arguments, g, retain_graph=True))(stack)
        return hessian, *batched, *mapped

    got, expected = derivatives("torch"), derivatives("reference")
    torch.testing.assert_close(got, expected)
    assert all(g.abs().sum() > 0 for g in got) and got[1].shape == (4, 3, 2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_transforms_of_torch_func_and_traces(activation, layout):
    """They see every step, where a custom gradient would have no rule: as with the plain convolution."""
    sizes = dict(batch=3, latents=2, maps=2, channels=3, height=5, width=7, kernel=(4, 3))
    z, coords, weight, bias = (t.detach() for t in tensors(sizes))
    upstream = torch.randn(3, 3, 5, 7, dtype=torch.float64)

    def forward_mode(f, *arguments):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(a, a.cos()) for a in arguments]
            return torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent

    results = {}
    for backend in ("torch", "reference"):
        def out(z, weight, coords, backend=backend):
            how = dict(activation=activation, out_format=layout, backend=backend)
            return broadcast_conv2d(z, coords, weight, bias, **how)

        def loss(z, weight, g):
            return (out(z[None], weight, coords)[0] * g).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))
        traced = torch.jit.trace(out, (z, weight, coords))
        results[backend] = [
            *torch.func.grad(lambda *a: (out(*a) * upstream).sum(), argnums=(0, 1, 2))(z, weight, coords),
            *per_sample(z, weight, upstream),
            torch.func.vmap(out, in_dims=(0, None, None))(torch.stack([z, z + 1]), weight, coords),
            torch.func.jvp(out, (z, weight, coords), (z.cos(), weight.cos(), coords.cos()))[1],
            torch.func.jacrev(out)(z, weight, coords),
            torch.func.linearize(out, z, weight, coords)[1](z.cos(), weight.cos(), coords.cos()),
            forward_mode(out, z, weight, coords),
            traced(z[:2] + 1, weight, coords),  # another batch size than traced
        ]
    torch.testing.assert_close(results["torch"], results["reference"])
    assert results["torch"][3].shape == (3, 2) and results["torch"][3].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_refuses_to_time_a_wrong_layer(dtype):
    case = (3, 4, 2, 5, 6, 7, 4, "same"), dtype, "cpu", "contiguous"
    right = bench.layer("torch", False, "same", "contiguous")
    assert bench.wrong(right, *case) is None
    for broken in (
        lambda z, coords, weight, bias: right(z, coords, weight, 0 * bias),
        lambda z, coords, weight, bias: right(z, coords.flip(0), weight, bias),
        lambda z, coords, weight, bias: right(z.detach() * 2 - z, coords, weight, bias),
    ):
        assert "error" in bench.wrong(broken, *case)
        with pytest.raises(ValueError, match="error"):
            args = types.SimpleNamespace(device="cpu", graph=False, seconds=0)
            bench.measure(broken, bench.inputs(case[0], dtype, "cpu"), *case[:2], case[3], args)


@pytest.mark.parametrize("broken", ["reference", "torch"])
def test_a_layer_that_fails_costs_the_bench_its_own_rows_only(broken, tmp_path, monkeypatch, capsys):
    layer = bench.layer

    def breaks(backend, *others):
        def fails(*_):
            raise RuntimeError("no such instruction")
        return fails if backend == broken else layer(backend, *others)

    monkeypatch.setattr(bench, "layer", breaks)
    monkeypatch.setattr(bench, "wrong", lambda *_: None)  # which runs the reference, too
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as bench sets them, for this test only
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setitem(bench.SHAPES, "paper-16", (2, 3, 2, 64, 8, 9, 4, "same"))
    assert bench.main(["--device", "cpu", "--shapes", "8x8", "paper-16", "--dtypes", "float32", "--no-compile",
                       "--seconds", "0", "--layouts", "contiguous", "--out", str(tmp_path)]) == 1
    said, other = capsys.readouterr().out, {"reference": "torch", "torch": "reference"}[broken]
    for shape in ("8x8", "paper-16"):
        assert f"FAILED {shape} float32 contiguous {broken}: RuntimeError: no such instruction" in said
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["shape"], row["implementation"]) for row in rows] == [("8x8", other)] * 3 + [("paper-16", other)] * 3
    assert all(float(row["speedup"]) == 1 if broken == "torch" else row["speedup"] == "nan" for row in rows)
    assert f"{other} " in next(tmp_path.glob("*.md")).read_text().rsplit("Decoder of Table 1", 1)[1]
    if broken == "torch":  # a failure in the decoder alone is told by the exit code, too
        monkeypatch.setattr(bench, "bench_layer", lambda *_: 0)
        assert bench.main(["--device", "cpu", "--shapes", "8x8", "--seconds", "0", "--no-compile",
                           "--out", str(tmp_path)]) == 1


def test_bench_told_to_stop_keeps_its_rows(tmp_path):
    command = [sys.executable, "-m", "kernels.bench", "--device", "cpu", "--shapes", "8x8", "--dtypes", "float32"]
    command += ["--no-compile", "--seconds", "0.05", "--out", tmp_path]
    root, pipes = Path(__file__).parent.parent, dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        for line in process.stdout:
            if "channels_last" in line:  # the rows before it, of the other layout, are written
                process.send_signal(signal.SIGINT)
                break
        left, errors = process.communicate()
    assert (process.returncode, errors) == (130, "") and "wrote" not in left
    (table,) = tmp_path.glob("*.md")
    assert "stopped before its end" in table.read_text() and "| 8x8 | float32 | contiguous |" in table.read_text()


# --- errors and imports ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(z=torch.zeros(2, 3, 1)), r"expected z \(B,K\)"),
        (dict(weight=torch.zeros(4, 6, 3, 3)), r"K\+M = 3\+2 input channels"),
        (dict(coords=torch.zeros(0, 5, 6)), "M >= 1"),
        (dict(bias=torch.zeros(3)), r"bias must be \(4,\)"),
        (dict(bias=torch.zeros(4).double()), "one dtype"),
        (dict(z=torch.zeros(2, 3).long()), "floating point"),
        (dict(padding="full"), "padding must be"),
        (dict(padding=-1), "padding must be"),
        (dict(padding=(1, 2, 3)), "padding must be"),
        (dict(padding=1.5), "padding must be"),
        (dict(activation="gelu"), "activation must be"),
        (dict(backend="cuda"), "backend must be"),
        (dict(out_format="nhwc"), "out_format must be"),
        (dict(backend="triton"), "needs"),
        (dict(z=torch.zeros(2, 3, device="meta")), "one device"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, message):
    arguments = dict(
        z=torch.zeros(2, 3), coords=torch.zeros(2, 5, 6), weight=torch.zeros(4, 5, 3, 3)
    )
    with pytest.raises(ValueError, match=message) as error:
        broadcast_conv2d(**{**arguments, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation=nn.ELU()), "activation must be None"),
        (dict(activation="ReLU"), "activation must be None"),
        (dict(backend="cuda"), "backend must be"),
        (dict(out_format="nhwc"), "out_format must be"),
        (dict(padding=-1), "padding must be"),
        (dict(padding=(1, 1, 1, 1)), "padding must be"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size must be an int or a pair"),
        (dict(kernel_size=(3, 0)), "kernel_size must be an int and at least 1, got 0"),
        (dict(height=6.0), "height must be an int"),
        (dict(kernel_size=9, padding="valid"), "9x9 kernel is larger than the padded 6x5 image"),
        (dict(coords=torch.zeros(2, 5, 6).numpy()), r"coords must be a tensor \(M, 6, 5\), .* got ndarray"),
        (dict(coords=torch.zeros(2, 5, 6)), r"coords must be a tensor \(M, 6, 5\), .* got \(2, 5, 6\)"),
        (dict(coords=torch.zeros(0, 6, 5)), r"M >= 1, got \(0, 6, 5\)"),
        (dict(coords=torch.zeros(1, 2, 6, 5)), r"got \(1, 2, 6, 5\)"),
        (dict(coords=nn.Parameter(torch.zeros(2, 6, 5))), "must not require a gradient"),
    ],
)  # fmt: skip
def test_the_module_refuses_when_it_is_made(change, message):
    arguments = dict(latents=3, out_channels=4, kernel_size=3, height=6, width=5)
    with pytest.raises(ValueError, match=message) as error:
        SpatialBroadcastConv2d(**{**arguments, **change})
    assert "\n" not in str(error.value)


def test_numpy_integers_and_the_meta_device():
    kernel, padding = np.array([3, 5]), np.array([1, 2])
    layer = SpatialBroadcastConv2d(3, 4, list(kernel), 6, 9, padding=list(padding), device="meta")
    assert layer(torch.zeros(2, 3, device="meta")).shape == (2, 4, 6, 9)


def test_the_module_says_what_it_is():
    layer = SpatialBroadcastConv2d(3, 4, [3, 5], 6, 9, activation="elu", coords_first=True)
    assert repr(layer) == ("SpatialBroadcastConv2d(5, 4, kernel_size=(3, 5), stride=(1, 1), padding=same, height=6, "
                           "width=9, activation='elu', coords_first=True)")
    with pytest.raises(ValueError, match=r"got \(2, 3, 1, 1\), .*; z.flatten\(1\) makes"):
        layer(torch.zeros(2, 3, 1, 1))


def test_works_without_triton_and_takes_no_cuda_context():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "layer = kernels.SpatialBroadcastConv2d(3, 4, 4, 6, 9)\n"
        "assert layer(torch.zeros(2, 3)).shape == (2, 4, 6, 9)\n"
        "layer.backend = 'triton'\n"
        "try: layer(torch.zeros(2, 3))\n"
        "except ValueError as e: print(e)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not installed" in run.stdout
