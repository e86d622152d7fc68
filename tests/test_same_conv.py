"""kernels/same_conv.py against the padded convolution in float64, path by path, and its rules."""

import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import same_conv
from kernels.same_conv import same_conv2d

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PATHS = {"winograd": same_conv._Winograd, "few outputs": same_conv._FewOut, "padded": same_conv._Padded}


def plain(x, weight, bias):
    """TensorFlow's rule: k - 1 rows of zeros, the odd one at the end."""
    low = [(n - 1) // 2 for n in weight.shape[2:]]
    pads = low[1], weight.shape[3] - 1 - low[1], low[0], weight.shape[2] - 1 - low[0]
    return F.conv2d(F.pad(x, pads), weight, bias)


def case(batch, c_in, c_out, height, width, k, bias=True, layout="contiguous", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, c_in, height, width, generator=g).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(c_out, c_in, k, k, generator=g) / (c_in * k * k) ** 0.5
    tensors = [x, weight] + ([torch.randn(c_out, generator=g)] if bias else [])
    upstream = torch.randn(batch, c_out, height, width, generator=g)
    return [t.requires_grad_() for t in tensors], upstream


def results(layer, tensors, upstream):
    """Output and the gradients of all tensors, None where there is no bias."""
    bias = tensors[2] if len(tensors) > 2 else None
    out = layer(tensors[0], tensors[1], bias)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out))]


def exact(tensors, upstream, layer=plain):
    return results(layer, [t.detach().double().requires_grad_() for t in tensors], upstream)


def errors(actual, expected):
    """Largest error of each, relative to the rms of what is expected."""
    assert len(actual) == len(expected)
    pairs = list(zip(actual, expected, strict=True))
    assert all(a.shape == e.shape for a, e in pairs)
    return [((a - e).abs().max() / e.square().mean().sqrt()).item() for a, e in pairs]


def close(actual, expected):
    return max(errors(actual, expected)) < 3e-4


SWEEP = list(itertools.product([3, 4, 5], ["contiguous", "channels_last"], [True, False], range(3)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k, layout, bias, seed", SWEEP)
def test_as_float64(path, k, layout, bias, seed):
    rng = random.Random(f"{path} {k} {layout} {bias} {seed}")
    sizes = [rng.choice(n) for n in ([1, 2, 3], [1, 2, 5], [1, 3, 4], [1, 2, 5, 7, 10, 13], [1, 3, 6, 8, 15, 21])]
    tensors, upstream = case(*sizes, k, bias, layout, seed)
    layer = lambda x, w, b: PATHS[path].apply(x, w, b)
    assert close(results(layer, tensors, upstream), exact(tensors, upstream)), sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path, sizes", [
    ("winograd", (2, 64, 64, 64, 64, 4)), ("winograd", (3, 32, 48, 31, 42, 4)), ("winograd", (3, 32, 32, 37, 30, 3)),
    ("winograd", (7, 64, 32, 17, 24, 5)),
    ("few outputs", (2, 64, 3, 64, 64, 4)), ("few outputs", (2, 64, 1, 33, 40, 3)),
    ("conv2d", (2, 8, 8, 9, 12, 4)), ("conv2d", (2, 8, 8, 9, 12, 3)), ("conv2d", (2, 8, 8, 9, 12, 1)),
])
def test_the_chosen_path(path, sizes, layout):
    tensors, upstream = case(*sizes, layout=layout)
    assert same_conv._path(*tensors) == path
    got, expected = results(same_conv2d, tensors, upstream), exact(tensors, upstream)
    assert close(got, expected)
    assert all(g.is_contiguous(memory_format=LAYOUTS[layout]) for g in got[:2])  # the output and x's gradient
    rms = [(a - e).square().mean().sqrt() / e.square().mean().sqrt() for a, e in zip(got, expected, strict=True)]
    assert max(rms) < 1e-5  # as the docstring says


def test_rules():
    path = lambda *sizes, **how: same_conv._path(*(t.to(**how) for t in case(*sizes)[0]))
    assert path(16, 64, 64, 64, 64, 4) == path(16, 64, 64, 16, 16, 4) == path(1, 64, 64, 64, 64, 4) == "winograd"
    assert path(16, 64, 3, 64, 64, 4) == path(1, 64, 1, 32, 32, 4) == "few outputs"
    assert path(1, 32, 3, 256, 256, 4) == "few outputs" and path(1, 32, 3, 512, 256, 4) == "conv2d"  # too large
    assert path(16, 64, 64, 8, 8, 4) == "conv2d"  # too few tiles
    assert path(16, 16, 16, 64, 64, 4) == path(16, 3, 64, 64, 64, 4) == "conv2d"  # too few channels
    assert path(16, 64, 3, 8, 8, 4) == path(2, 16, 3, 64, 64, 4) == "conv2d"
    assert path(2, 64, 64, 64, 64, 6) == path(2, 64, 64, 64, 64, 2) == path(2, 64, 3, 64, 64, 1) == "conv2d"
    assert path(2, 64, 64, 64, 64, 4, dtype=torch.float64) == "conv2d"
    assert path(2, 64, 64, 64, 64, 4, device="meta") == "conv2d"
    tensors, _ = case(1, 32, 32, 50, 50, 3)  # 81 tiles
    assert same_conv._path(*tensors) == "conv2d"
    tensors, _ = case(1, 32, 32, 55, 55, 3)  # 100
    assert same_conv._path(*tensors) == same_conv._path(*tensors[:2], None) == "winograd"
    assert same_conv._path(tensors[0], torch.zeros(32, 32, 3, 4), None) == "conv2d"
    with torch.autocast("cpu", torch.bfloat16):
        assert same_conv._path(*tensors) == "conv2d" and same_conv2d(*tensors).dtype == torch.bfloat16


def test_rules_for_bfloat16():
    def path(*sizes, layout="contiguous", **how):
        return same_conv._path(*(t.to(**how) for t in case(*sizes, layout=layout)[0]))

    half, last = dict(dtype=torch.bfloat16), dict(dtype=torch.bfloat16, layout="channels_last")
    assert path(2, 64, 3, 64, 64, 4, **half) == path(16, 32, 1, 32, 32, 3, **half) == "few outputs"
    assert path(1, 64, 3, 64, 64, 4, **half) == path(16, 64, 64, 64, 64, 3, **half) == "conv2d"
    assert path(8, 64, 64, 64, 64, 4, **last) == path(16, 128, 8, 32, 32, 4, **last) == "padded"
    assert path(8, 64, 64, 64, 64, 4, **half) == path(8, 64, 64, 64, 64, 3, **last) == "conv2d"
    assert path(7, 64, 64, 64, 64, 4, **last) == path(2, 64, 3, 64, 64, 4, dtype=torch.float16) == "conv2d"
    x, weight, bias = case(2, 64, 3, 64, 64, 4)[0]
    assert same_conv._path(x.bfloat16(), weight, bias) == "conv2d"  # which says what is wrong
    for dtype, expected in ((torch.bfloat16, "few outputs"), (torch.float16, "conv2d")):
        with torch.autocast("cpu", dtype):
            assert same_conv._path(x, weight, bias) == same_conv._path(x.bfloat16(), weight, None) == expected
            assert same_conv._path(x.double(), weight, bias) == "conv2d"
            assert same_conv2d(x, weight, bias).dtype == same_conv2d(x.bfloat16(), weight).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_units_are_for_bfloat16(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert same_conv._has_amx(torch.zeros(1, dtype=dtype)) == (dtype == torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not same_conv._has_amx(torch.zeros(1, dtype=dtype))
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not same_conv._has_amx(torch.zeros(1, dtype=dtype))


@pytest.fixture(params=[False, True], ids=["without AMX", "as with AMX"])
def amx(request, monkeypatch):
    """Both forms run on any CPU."""
    monkeypatch.setattr(same_conv, "_has_amx", lambda x: request.param and x.dtype == torch.bfloat16)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path, sizes", [
    ("few outputs", (3, 64, 3, 61, 64, 4)), ("few outputs", (8, 32, 4, 40, 33, 3)),
    ("few outputs", (5, 64, 1, 48, 50, 5)), ("few outputs", (128, 32, 1, 34, 33, 3)),
    ("padded", (3, 24, 16, 61, 40, 4)), ("padded", (2, 64, 64, 33, 34, 4)),
])
def test_bfloat16(path, sizes, autocast, layout, amx, monkeypatch):
    """Against float64 on the same bfloat16 numbers: the errors of the plain convolution, or a little more."""
    if path == "padded":
        monkeypatch.setattr(same_conv, "_path", lambda *_: path)
    monkeypatch.setattr(same_conv, "_MAPS", 300_000)  # in pieces: 1, 1, 1; 6, 2; 5; 128 images of 1
    tensors, upstream = case(*sizes, layout=layout)
    tensors = [t.bfloat16().detach() for t in tensors]
    expected = exact(tensors, upstream.bfloat16().double())
    given = [t.float() if autocast else t for t in tensors]
    rms = {}
    for name, layer in (("ours", same_conv2d), ("plain", plain)):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert same_conv._path(*leaves) == path
            got = results(layer, leaves, upstream)  # backward inside autocast, too
            assert all(g.dtype == t.dtype for g, t in zip(got[1:], leaves, strict=True))
        assert got[0].dtype == torch.bfloat16
        if name == "ours":
            assert got[0].is_contiguous(memory_format=LAYOUTS[layout])
        rms[name] = [((a - e).square().mean() / e.square().mean()).sqrt() for a, e in zip(got, expected, strict=True)]
    assert max(rms["ours"]) < 4e-3 and rms["ours"][2] < 2.7e-3  # rounded once, however many pieces
    assert not autocast or path == "padded" or rms["ours"][3] < 1e-5  # the bias's gradient stays in float32
    assert all(a < 2 * b + 1e-6 for a, b in zip(rms["ours"], rms["plain"], strict=True)), rms


@pytest.mark.parametrize("path, k", [("few outputs", 3), ("few outputs", 4), ("padded", 4)])
def test_bfloat16_outputs_may_be_changed_in_place(path, k, amx, monkeypatch):
    monkeypatch.setattr(same_conv, "_path", lambda *_: path)
    (x, weight, bias), upstream = case(2, 32, 3, 32, 36, k)
    with torch.autocast("cpu", torch.bfloat16):
        found = [torch.autograd.grad(act(same_conv2d(x, weight, bias)), (x, weight, bias), upstream.bfloat16())
                 for act in (torch.relu_, torch.relu)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rectangular_kernels_and_empty_batches():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 7, generator=g), torch.randn(4, 3, 2, 5, generator=g)
    assert close([same_conv2d(x, weight)], [plain(x.double(), weight.double(), None)])
    for layer in (same_conv2d, *(p.apply for p in PATHS.values())):
        tensors, upstream = case(0, 64, 3, 32, 32, 4)
        got = results(layer, tensors, upstream)
        assert got[0].shape == (0, 3, 32, 32) and got[1].shape == (0, 64, 32, 32)
        assert not got[2].any() and not got[3].any()


@pytest.mark.parametrize("sizes", [(2, 32, 32, 40, 40, 4), (2, 32, 3, 40, 40, 4)])
def test_strided_inputs(sizes):
    """Slices, transposed and expanded tensors, as input, weight and upstream gradient."""
    (x, weight, bias), upstream = case(*sizes)
    g = torch.Generator().manual_seed(1)
    views = [
        (torch.randn(2, 32, 80, 40, generator=g)[:, :, ::2], weight),
        (x.detach().transpose(2, 3), weight.detach().transpose(2, 3)),
        (torch.randn(1, 32, 40, 40, generator=g).expand(2, -1, -1, -1), weight[:, :1].detach().expand(-1, 32, -1, -1)),
        (torch.randn(2, 1, 1, 40, generator=g).expand(-1, 32, 40, -1), weight),
    ]
    for image, kernel in views:
        for up in (upstream, upstream.transpose(2, 3), torch.ones(()).expand_as(upstream)):
            tensors = [t.detach().requires_grad_() for t in (image, kernel, bias)]
            assert same_conv._path(*tensors) != "conv2d"
            assert close(results(same_conv2d, tensors, up), exact(tensors, up))


@pytest.mark.parametrize("sizes", [(1, 32, 32, 50, 50, 4), (1, 64, 3, 40, 40, 4)])
def test_the_comparator_sees_mistakes(sizes):
    def shifted(x, w, b):
        return F.conv2d(F.pad(x, (2, 1, 2, 1)), w, b)

    wrong = {
        "zeros": lambda x, w, b: plain(x, w, b) * 0,
        "swapped axes": lambda x, w, b: plain(x, w, b).transpose(2, 3),
        "no bias": lambda x, w, b: plain(x, w, b * 0),
        "padded one off": shifted,
        "transposed kernel": lambda x, w, b: plain(x, w.transpose(2, 3), b),
        "flipped kernel": lambda x, w, b: plain(x, w.flip(2, 3), b),
        "one pixel": lambda x, w, b: torch.cat([plain(x, w, b)[..., :-1], plain(x, w, b)[..., -1:] * 1.01], -1),
    }
    tensors, upstream = case(*sizes)
    expected = exact(tensors, upstream)
    assert close(results(same_conv2d, tensors, upstream), expected)
    for name, layer in wrong.items():
        assert not close(exact(tensors, upstream, layer), expected), name
    for i in range(4):  # and in each gradient by itself
        got = results(same_conv2d, tensors, upstream)
        got[i] = got[i] * 1.001
        assert not close(got, expected), i


@pytest.mark.parametrize("sizes", [(2, 64, 64, 40, 40, 4), (2, 64, 3, 40, 40, 4)])
def test_only_gradients_asked_for(sizes, monkeypatch):
    tensors, upstream = case(*sizes)
    expected = exact(tensors, upstream)
    for need in itertools.product([False, True], repeat=3):
        given = [t.detach().requires_grad_(n) for t, n in zip(tensors, need, strict=True)]
        out = same_conv2d(*given)
        assert out.requires_grad == any(need)
        if not any(need):
            continue
        if same_conv._path(*given) == "winograd":  # what only the weight's gradient wants is not kept
            assert (len(out.grad_fn.saved_tensors) > 3) == need[1]
        calls = []
        with monkeypatch.context() as m:
            for name in ("bmm", "mm"):
                real = getattr(torch, name)
                m.setattr(torch, name, lambda *a, f=real, n=name, calls=calls, **k: calls.append(n) or f(*a, **k))
            with torch.no_grad():
                grads = out.grad_fn.apply(upstream)
        assert [g is not None for g in grads] == list(need)
        assert close([g for g in grads if g is not None], [e for e, n in zip(expected[1:], need, strict=True) if n])
        if need == (False, False, True):
            assert not calls
        assert calls.count("bmm") == need[0] + (need[1] and sizes[2] == 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(2, 32, 32, 41, 38, 4), (2, 64, 3, 40, 41, 5)])
def test_second_derivatives_and_batches_of_gradients(sizes, bias, layout):
    """A gradient penalty, and stacks of gradients two ways: as with the plain convolution."""
    given, upstream = case(*sizes, bias, layout)
    assert same_conv._path(*given, *[None] * (1 - bias)) != "conv2d"

    def derivatives(layer, tensors, upstream):
        out = layer(*tensors, *[None] * (1 - bias))
        first = torch.autograd.grad(out, tensors, upstream, create_graph=True)
        penalty = sum(g.square().mean() for g in first[:2])
        second = torch.autograd.grad(penalty, [*tensors[:2], upstream], retain_graph=True)
        stack = torch.stack([upstream, upstream.flip(0)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # slice by slice
            batched = torch.autograd.grad(out, tensors, stack, is_grads_batched=True, retain_graph=True)
            mapped = torch.vmap(lambda g: torch.autograd.grad(out, tensors, g, retain_graph=True))(stack)
        return *second, *batched, *mapped

    got = derivatives(same_conv2d, given, upstream.requires_grad_())
    doubles = [t.detach().double().requires_grad_() for t in (*given, upstream)]
    expected = derivatives(plain, doubles[:-1], doubles[-1])
    assert close(got, expected)
    assert not close([got[0] * 1.001, *got[1:]], expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("sizes", [(2, 64, 64, 40, 41, 4), (2, 64, 3, 40, 41, 4)])
def test_transforms_of_torch_func_and_traces_take_the_plain_convolution(sizes):
    """For which PyTorch has rules, as it has none for a custom gradient."""
    (x, weight, bias), upstream = case(*sizes)
    assert same_conv._path(x, weight, bias) != "conv2d"
    arguments = x.detach(), weight.detach(), bias.detach()
    grads = torch.func.grad(lambda *a: (same_conv2d(*a) * upstream).sum(), argnums=(0, 1, 2))(*arguments)
    assert close([same_conv2d(*arguments), *grads], exact((x, weight, bias), upstream))
    per_image = torch.func.vmap(lambda x: same_conv2d(x[None], *arguments[1:])[0])(arguments[0])
    torch.testing.assert_close(per_image, same_conv2d(*arguments), rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(same_conv2d, arguments)
    torch.testing.assert_close(traced(*arguments), per_image)


def test_tensors_without_numbers_take_the_plain_convolution():
    """Before and after real ones: Winograd's constants kept from either would not do for the other."""
    sizes = 2, 64, 64, 40, 41, 4
    real, upstream = case(*sizes)
    same_conv._matrices.cache_clear()
    for _ in range(2):
        with FakeTensorMode():
            fake, _ = case(*sizes)
            shapes = [t.shape for t in results(same_conv2d, fake, torch.empty(upstream.shape))]
        got = results(same_conv2d, real, upstream)
        assert shapes == [t.shape for t in got]
        assert close(got, exact(real, upstream))


@pytest.mark.parametrize("sizes", [(3, 64, 64, 40, 40, 4), (3, 64, 3, 40, 40, 4)])
def test_same_bits_again(sizes):
    tensors, upstream = case(*sizes)
    first = results(same_conv2d, tensors, upstream)
    for _ in range(3):
        waste = torch.randn(random.Random(0).randrange(10**5))  # other addresses
        assert all(torch.equal(a, b) for a, b in zip(first, results(same_conv2d, tensors, upstream), strict=True))
        del waste


@pytest.mark.parametrize("sizes", [(5, 64, 64, 24, 24, 4), (5, 64, 3, 32, 33, 4)])
def test_pieces_do_not_matter(sizes, monkeypatch):
    tensors, upstream = case(*sizes)
    whole = results(same_conv2d, tensors, upstream)
    monkeypatch.setattr(same_conv, "_PIECE", 2 * 4 * 64 * 25 * 64)  # two images
    monkeypatch.setattr(same_conv, "_MAPS", 2 * 16 * 3 * 32 * 33)
    made, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: made.append(len(a[0])) or bmm(*a, **k))
    assert close(results(same_conv2d, tensors, upstream), [t.double() for t in whole])
    if sizes[2] == 3:  # forward, x's gradient and weight's, of two images, two and one
        assert sorted(made) == [1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_training_with_it_is_training_without(monkeypatch):
    """Two steps of the model end at the same weights, to what float32 can tell."""
    import sbvae

    assert sbvae.same_conv2d is same_conv2d
    config = sbvae.resolve(sbvae.Config(device="cpu", batch_size=2))
    config.precision = "fp32"
    ends, seen = [], []
    recorded = lambda *a: seen.append(same_conv._path(*a)) or same_conv2d(*a)
    for layer in (recorded, None):
        monkeypatch.setattr(sbvae, "same_conv2d", layer)
        model, g = sbvae.build_model(config), torch.Generator().manual_seed(0)
        begin = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        sgd = torch.optim.SGD(model.parameters(), lr=1e-5)
        for _ in range(2):
            sbvae.training_step(config, sbvae.Sprites(), g, model, sgd)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert set(seen) == {"winograd", "few outputs"}
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[1] - begin).norm()


@pytest.mark.parametrize("c_out", [64, 3])
@pytest.mark.parametrize("forward, backward", [(False, True), (True, False), (True, True)])
def test_backward_in_the_precision_of_forward(c_out, forward, backward, amx):
    """Whatever autocast says when it runs."""
    tensors, upstream = case(8, 64, c_out, 64, 64, 4, layout="channels_last")
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        path = {64: ("winograd", "padded"), 3: ("few outputs",) * 2}[c_out][forward]
        assert same_conv._path(*tensors) == path
        out = same_conv2d(*tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        grads = torch.autograd.grad(out, tensors, upstream.to(out))
    found, expected = [out, *grads], exact(tensors, upstream)
    assert all(g.dtype == torch.float32 for g in grads)
    if forward:
        assert 1e-3 < max(errors(found, expected)) < 0.1
    else:
        assert close(found, expected)


@pytest.mark.parametrize("c_out, path", [(64, "padded"), (3, "few outputs")])
def test_bfloat16_derivatives_are_those_of_the_plain_convolution(c_out, path, amx, monkeypatch):
    """Under autocast: a gradient penalty, and a stack of gradients."""
    monkeypatch.setattr(same_conv, "_path", lambda *_: path)
    tensors, upstream = case(2, 64, c_out, 64, 64, 4)
    found = {}
    for layer in (same_conv2d, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(*tensors)
        first = torch.autograd.grad(out, tensors, upstream.to(out), create_graph=True)
        second = torch.autograd.grad(sum(g.square().mean() for g in first[:2]), tensors[:2], retain_graph=True)
        stack = torch.stack([upstream, upstream.flip(0)]).to(out)
        found[layer] = *first, *second, *torch.autograd.grad(out, tensors, stack, is_grads_batched=True)
    for a, b in zip(found[same_conv2d], found[plain], strict=True):
        assert a.dtype == b.dtype and ((a - b).norm() < 0.02 * b.norm())


def test_without_gradients_nothing_is_kept(monkeypatch):
    """Each piece's V is gone when the next but one is made, though the weight would have a gradient elsewhere."""
    import weakref

    monkeypatch.setattr(same_conv, "_PIECE", 1)
    tiles, alive, most = same_conv._tiles, [], []

    def watched(*args):
        V = tiles(*args)
        most.append(sum(v() is not None for v in alive))
        alive.append(weakref.ref(V))
        return V

    monkeypatch.setattr(same_conv, "_tiles", watched)
    tensors, _ = case(6, 32, 32, 20, 20, 4)
    with torch.no_grad():
        out = same_conv2d(*tensors)
    assert len(most) == 6 and max(most) <= 1 and not out.requires_grad
    alive.clear()
    same_conv2d(*tensors)
    assert max(most) == 5  # kept, as it should be, where there is a backward pass


@pytest.mark.parametrize("c_out", [64, 3])
def test_the_default_device_does_not_matter(c_out):
    tensors, _ = case(2, 64, c_out, 40, 36, 4)
    expected = same_conv2d(*tensors)
    same_conv._matrices.cache_clear()
    with torch.device("meta"):
        out = same_conv2d(*tensors)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("c_out", [64, 3])
def test_what_does_not_fit_is_refused(c_out):
    (x, weight, _), _ = case(2, 64, c_out, 40, 36, 4)
    for wrong in (torch.ones(1), torch.ones(c_out + 1), torch.ones(c_out, 1)):
        with pytest.raises(RuntimeError, match="bias"):
            same_conv2d(x, weight, wrong)
    with pytest.raises(RuntimeError, match="to have 64 channels, but got 32 channels"):
        same_conv2d(x[:, :32], weight)


@pytest.mark.parametrize("c_out", [64, 3])
def test_an_image_without_a_batch(c_out):
    (x, weight, bias), _ = case(1, 64, c_out, 40, 36, 4)
    torch.testing.assert_close(same_conv2d(x[0], weight, bias), same_conv2d(x, weight, bias)[0], rtol=1e-4, atol=1e-4)
