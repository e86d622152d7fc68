"""The spatial broadcast decoder's other layers on a CPU: convolutions in fewer multiply-adds.

    out = conv2d(pad(x), weight, bias)            stride 1, out as large as x (TensorFlow's "same")

x (B,C,H,W), weight (D,C,k,k). For k=4 one row of zeros goes before, two after. Of a training step
of Watters et al. (2019) on a CPU nearly all is the layer 64 -> 64 at 64x64: k*k*C*D = 65,536
multiply-adds for each pixel. Units for half precision do them faster; without such units there is
only doing fewer. Two ways, of which the second pays in half precision, too, and for the rest the
plain convolution, which in half precision is spared two passes over memory:

Winograd (many channels). One axis first. The m outputs y_i = sum_j w_j x_(i+j) of a tile of m+k-1
inputs would take m*k products. Now let polynomials w(t) and v(t) have k and m coefficients. Their
product has m+k-1, and is determined by its values at m+k-1 points, each the product of two numbers:
m+k-1 products. In matrices, E_n the values of a polynomial with n coefficients at the points,

    w * v = E_(m+k-1)^-1 ((E_k w) (E_m v))          elementwise in the middle

For w fixed this is a matrix times v. Its transpose takes m+k-1 inputs to m outputs, and it is the
sliding sum that we want (Cook-Toom, Winograd):

    y = A^T ((G w) (B x))       A = E_m (8 x m), G = E_k (8 x k), B = (E_(m+k-1)^-1)^T (8 x 8)

The tiles have m+k-1 = 8 inputs, so m = 9-k is 5 for k=4, and the points are 0, +-1, +-1/2, +-2 and
infinity (where a polynomial's value is its last coefficient). On two axes the same is done to
columns, then to rows. Elementwise products add up over channels, which makes 64 matrix products:

    V = B x B^T (64, tiles, C)     U = G w G^T (64, C, D)     M = V @ U     y = A^T M A + bias

Products for a pixel and a pair of channels: 64/25 instead of 16, 6.25 times fewer (k=3: 64/36, 5.1
times; k=5: 64/16, 6.25 times). What it costs is V and M, 2.6 times the size of x and y, and the
small matrices that make them: cheap only where they stay in cache. So the batch goes in pieces,
channels last, and every step is a long matrix product or a copy. Backward is the transpose of each,
in reverse: dM = A dy A^T, dU = V^T @ dM, dV = dM @ U^T, dx = the tiles B^T dV B laid out and added
where they overlap. V is kept for it where weight needs a gradient (44 MB in this layer, 2.6
times x): to make it again would take a sixth longer. x is kept, too, for a second derivative.

    B=16, 64 -> 64, 64x64, k=4         forward     backward (millions of multiply-adds)
    plain                                 4295     8590
    products M, dU, dV                     709     1418     13 x 13 tiles: 65 x 65 pixels
    transforms B and A, transposed         238      238

Few outputs (64 -> 3). A convolution library fills its vectors with output channels, and 3 fill
none. First multiply, then move: every pixel's products with all k*k*D rows of weight are one matrix
product (k*k*D,C) @ (C,H*W), and the output is the sum of k*k shifted maps of D channels. Backward
shifts dy, k*k*D maps, and two products of that size give dx and dweight. Where a CPU has units for
whole matrices (AMX, bfloat16), dweight alone is done so: for the output and dx the convolution is
quick enough there.

Errors. float32, against float64, relative to the rms of the exact result, for weights and ReLU
activations as the decoder has them (64 -> 64, k=4), rms / largest:

    all times 1e-7                output       dx           dweight      dbias
    64 -> 64  Winograd            24 / 330     30 / 280     38 / 270     1.1 / 2.8
              F.conv2d            3.9 / 47     2.1 / 15     16 / 160     19 / 57
    64 -> 3   few outputs         1.2 / 8.2    1.2 / 19     1.9 / 7.1    1.8 / 2.8
              F.conv2d            4.0 / 39     0.8 / 7.6    9.5 / 66     54 / 88
    64 -> 3 in bfloat16, all times 1e-3
              few outputs         2.3 / 16     1.7 / 17     2.3 / 11     1.9 / 2.8
              F.conv2d            1.7 / 12     1.7 / 17     1.6 / 9.7    1.9 / 2.8

Tiles of 4x4 outputs at their best points have 0.6 times the error of 5x5 and take a tenth longer,
6x6 have 2.6 times the error and are no faster (their tiles fit 64 pixels less well).

Which is taken (`same_conv2d`), and by how many times faster than F.conv2d in the same format it is,
forward / backward, CPU time of one thread, B=16, k=4:

Winograd where C*D >= 1024, both >= 16, k is 3 to 5, and there are 96 tiles or more. Zen 1,
contiguous | channels last:

    64 -> 64, 64x64     1.5 / 2.2 | 1.7 / 2.5
    32 -> 32, 64x64     1.0 / 1.6 | 1.0 / 1.6
    64 -> 16, 64x64     0.9 / 1.5 | 0.9 / 1.5
    64 -> 64, 16x16     1.0 / 1.5 | 1.0 / 1.4     (256 tiles)
    64 -> 64, 32x32     1.0 / 1.4 | 1.1 / 1.5     B=2 (98 tiles)
    64 -> 64, 8x8       0.7 / 1.0 | 0.7 / 1.0     (64 tiles: not taken)
    16 -> 16, 64x64     0.7 / 1.1 | 0.6 / 1.1     (not taken)
    k=3, 64 -> 64       1.0 / 1.7 | 1.2 / 2.1
    k=5, 64 -> 64       1.7 / 2.7 | 1.8 / 3.0
    k=2, 64 -> 64       0.7 / 1.1 | 0.7 / 1.4     (not taken)

Few outputs where D <= 4, C >= 32, k is 3 to 5, H*W >= 1024 and k*k*D*H*W <= 2^22; in bfloat16 where
also B*H*W >= 8192. Zen 4 (AVX512-BF16), contiguous | channels last | bfloat16, channels last || the
last on a Xeon with AMX:

    64 -> 3, 64x64      3.8 / 3.6 | 2.4 / 1.9 | 1.9 / 2.3 || 1.6 / 1.7
    64 -> 1, 64x64      7.0 / 10  | 4.6 / 4.0 | 3.8 / 5.2 || 1.7 / 1.0
    k=3, 64 -> 4        3.9 / 4.4 | 2.1 / 1.7 | 1.4 / 1.9 || 1.0 / 1.1
    32 -> 3, 64x64      2.6 / 2.8 | 2.2 / 1.3 | 1.2 / 1.7 || 1.3 / 1.6
    32 -> 4, 64x64      2.1 / 2.1 | 1.9 / 1.1 | 1.0 / 1.3 || 1.3 / 1.4
    k=5, 32 -> 4        0.9 / 2.2 | 1.6 / 1.1 | 0.9 / 1.3 || 1.0 / 1.0
    64 -> 3, 256x256    2.2 / 3.2 | 2.2 / 1.6 | 0.8 / 2.4 || 0.9 / 2.1     B=1
    64 -> 6, 64x64      1.8 / 1.9 | 1.6 / 1.1 | 1.0 / 1.3                  (not taken)
    32 -> 8, 64x64      1.0 / 1.1 | 0.9 / 0.6 | 0.5 / 0.8                  (not taken)

Padded without the two passes: bfloat16, channels last, k = 4 and B*C*H*W >= 2^21. Xeon with AMX:

    64 -> 64, 64x64     1.05 / 1.08
    32 -> 32, 64x64     1.03 / 1.04
    64 -> 16, 64x64     1.07 / 1.12
    64 -> 64, 128x128   1.07 / 1.06
    64 -> 64, 32x32     0.97 / 0.99     (1,048,576 numbers: not taken)
    64 -> 64, 64x64     0.93 / 0.98     B=2 (not taken)

Only on a CPU, Winograd only in float32 and not under autocast, and neither under torch.compile,
torch.func's transforms, forward-mode derivatives or torch.jit.trace, nor for subclasses of Tensor;
all else is the padded F.conv2d. Where Winograd does not pay: few channels, small images, CPUs with bf16 units (then use
bfloat16), and two or more threads on a machine that others use, as each of the many short
operations waits for the slowest thread (measured with 3 busy processes on 2 cores: 0.7 times as
fast as F.conv2d; with OMP_WAIT_POLICY=passive 2.1 times). With create_graph all is the plain
convolution's, and gradients of all that requires one are made, even if only x's was asked for.
Until the backward pass x must stay as it is. In bfloat16 its gradient may be a view of a larger
tensor (not a leaf's `.grad`). Same input and number of threads, same bits.

MIT License, Copyright (c) 2026 The sbvae authors. Tested with PyTorch 2.11, 2.13 and 2.14.
"""

import functools

import torch
import torch.nn.functional as F

_TILE = 8
_POINTS = (0, 1, -1, 0.5, -0.5, 2, -2)  # and infinity
# Bytes of V made at a time: small enough for a last-level cache, large enough that the threads,
# which wait for each other after every operation, seldom do so.
_PIECE = 12_000_000
_MAPS = 2**22  # numbers in the shifted maps made at a time: 17 MB in float32


# --- Winograd -------------------------------------------------------------------------------------


@functools.cache
def _matrices(k, dtype=torch.float32):
    """A (8,m), G (8,k), B (8,8) of y = A^T ((G w) * (B x)): 8 inputs, k taps, m = 9 - k outputs."""
    points = torch.tensor(_POINTS, dtype=torch.float64, device="cpu")  # whatever the default is

    def evaluate(size):  # a polynomial with so many coefficients; at infinity only the last counts
        powers = torch.arange(size, device="cpu")
        return torch.cat([points[:, None] ** powers, (powers == size - 1)[None].double()])

    B = torch.linalg.inv(evaluate(_TILE)).T
    scale = B.abs().amax(1, keepdim=True).log2().round().exp2()  # powers of two round nothing
    return [M.to(dtype) for M in (evaluate(_TILE + 1 - k), evaluate(k) * scale, B / scale)]


def _first(matrix, x):
    """`matrix` along the first axis of x: one long product."""
    return torch.mm(matrix, x.reshape(len(x), -1)).view(len(matrix), *x.shape[1:])


def _second(matrix, x):
    """`matrix` along the second axis of x."""
    return torch.matmul(matrix, x.flatten(2)).view(len(x), len(matrix), *x.shape[2:])


def _tiles(x, k):
    """V (64,tiles,C): the overlapping 8x8 tiles of images x (N,H,W,C), B applied to both axes."""
    B, m, before = _matrices(k)[2], _TILE + 1 - k, (k - 1) // 2
    height, width = (m * (-(-n // m) + 1) for n in x.shape[1:3])
    x = F.pad(x, (0, 0, before, width - before - x.shape[2], before, height - before - x.shape[1]))
    v = _first(B, x.unfold(1, _TILE, m).movedim(-1, 0))  # (8,N,rows,width,C)
    return _first(B, v.unfold(3, _TILE, m).movedim(-1, 0)).view(64, -1, x.shape[3])


def _overlap(v, dim, m):
    """The transpose of unfold(dim - 1, 8, m).movedim(-1, 0): tiles laid out and added up."""
    v = v.movedim(0, dim)
    tiles = v.shape[dim - 1]
    out = v.new_zeros(*v.shape[: dim - 1], tiles + 1, m, *v.shape[dim + 1 :])
    out.narrow(dim - 1, 0, tiles).copy_(v.narrow(dim, 0, m))
    out.narrow(dim - 1, 1, tiles).narrow(dim, 0, _TILE - m).add_(v.narrow(dim, m, _TILE - m))
    return out.flatten(dim - 1, dim)


class _Winograd(torch.autograd.Function):
    """In pieces of the batch that stay in cache; within a piece channels come last."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias):
        c_out, c_in, k, _ = weight.shape
        batch, _, height, width = x.shape
        m = _TILE + 1 - k
        rows, cols = -(-height // m), -(-width // m)
        A, G, _ = _matrices(k, torch.float64)
        U = torch.einsum("jq,ip,dcpq->jicd", G, G, weight.double()).to(x.dtype)
        U, At = U.reshape(64, c_in, c_out), A.T.to(x.dtype)
        out = torch.empty_like(x[:, :1].expand(-1, c_out, -1, -1), memory_format=_format(x))
        step = max(1, _PIECE // (4 * 64 * rows * cols * c_in))
        saved = []
        for here, to in zip(*(t.permute(0, 2, 3, 1).split(step) for t in (x, out)), strict=True):
            V = _tiles(here, k)
            if ctx.needs_input_grad[1]:
                saved.append(V)
            y = torch.bmm(V, U).view(8, 8, len(here), rows, cols, c_out)
            y = _second(At, _first(At, y)).permute(2, 3, 1, 4, 0, 5)  # (N,rows,m,cols,m,c_out)
            y = y.reshape(len(here), rows * m, cols * m, c_out)[:, :height, :width]
            to.copy_(y) if bias is None else torch.add(y, bias, out=to)
        ctx.save_for_backward(x, weight, U, *saved)
        ctx.arguments = k, step, _format(x)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # in the precision of the forward pass
    def backward(ctx, grad):
        x, weight, U, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or _batched(grad):  # a second derivative is wanted, or many at once
            return _plain_backward(grad, x, weight, ctx.needs_input_grad)
        k, step, memory_format = ctx.arguments
        (batch, c_out, height, width), c_in = grad.shape, U.shape[1]
        A, _, B = _matrices(k)
        m, before = _TILE + 1 - k, (k - 1) // 2
        rows, cols = -(-height // m), -(-width // m)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if need_x:
            shape = batch, c_in, height, width
            grad_x = torch.empty(shape, dtype=grad.dtype, memory_format=memory_format)
        dU = torch.zeros_like(U)
        last = grad.permute(0, 2, 3, 1)
        for i, g in enumerate(last.split(step) if need_x or need_weight else ()):
            n = len(g)
            g = F.pad(g, (0, 0, 0, cols * m - width, 0, rows * m - height))
            g = g.unflatten(1, (rows, m)).unflatten(3, (cols, m)).permute(4, 2, 0, 1, 3, 5)
            dM = _first(A, _second(A, g)).view(64, -1, c_out)
            if need_weight:
                dU.baddbmm_(saved[i].mT, dM)
            if need_x:
                v = torch.bmm(dM, U.mT).view(8, 8, n, rows, cols, c_in)
                v = _overlap(_first(B.T, _overlap(_first(B.T, v), 4, m)), 2, m)
                v = v[:, before : before + height, before : before + width]
                grad_x[i * step : i * step + n] = v.permute(0, 3, 1, 2)
        if need_weight:
            G = _matrices(k, torch.float64)[1]
            dU = dU.view(8, 8, c_in, c_out).double()
            grad_weight = torch.einsum("jq,ip,jicd->dcpq", G, G, dU).to(grad.dtype)
        return grad_x, grad_weight, last.sum((0, 1, 2)) if need_bias else None


# --- few output channels --------------------------------------------------------------------------


class _FewOut(torch.autograd.Function):
    """In pieces of the batch, for their k*k*D maps take memory. x is float32 or bfloat16; maps are added
    up in float32, and so are the gradients of weight and bias. With AMX plain convolutions make the
    output and x's gradient."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        (c_out, c_in, kh, kw), (height, width) = weight.shape, x.shape[2:]
        if _has_amx(x):
            out = _symmetric(x, weight, bias)
            return out if kh % 2 else out[:, :, 1:, 1:].contiguous(memory_format=_format(x))
        taps = weight.permute(2, 3, 0, 1).reshape(-1, c_in).to(x.dtype)
        left, _, top, _ = _pads(kh, kw)
        out = torch.empty_like(x[:, :1].expand(-1, c_out, -1, -1), memory_format=_format(x))
        step = _images(taps, x)
        for here, to in zip(x.split(step), out.split(step), strict=True):
            maps = torch.bmm(taps.expand(len(here), -1, -1), here.flatten(2)).float()
            maps = maps.view(-1, kh, kw, c_out, height, width)
            total = maps.new_zeros(len(here), c_out, height, width)
            if bias is not None:
                total += bias[:, None, None]
            for i in range(kh):
                ys, from_ys = _shifted(i - top, height)
                for j in range(kw):
                    xs, from_xs = _shifted(j - left, width)
                    total[:, :, ys, xs] += maps[:, i, j, :, from_ys, from_xs]
            to.copy_(total)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # in the precision of the forward pass
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or _batched(grad):
            return _plain_backward(grad, x, weight, ctx.needs_input_grad)
        c_out, c_in, kh, kw = weight.shape
        need_x, need_weight, need_bias = ctx.needs_input_grad
        taps = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, c_in).to(x.dtype)
        grad_x = None
        if need_x and _has_amx(x):
            grad_x = _symmetric(grad, weight.flip(2, 3).transpose(0, 1), None)
            grad_x, need_x = grad_x[:, :, : x.shape[2], : x.shape[3]], False
        elif need_x:
            grad_x = torch.empty_like(x, memory_format=_format(x))
        d_taps = torch.zeros_like(taps, dtype=torch.float32)
        left, right, top, bottom = _pads(kh, kw)
        grad = grad.contiguous()  # so that windows are made of rows
        step = _images(taps, x)
        for i in range(0, len(x) if need_x or need_weight else 0, step):
            windows = F.pad(grad[i : i + step], (right, left, bottom, top))
            windows = windows.unfold(2, kh, 1).unfold(3, kw, 1).permute(0, 4, 5, 1, 2, 3)
            g = windows.reshape(len(windows), len(taps), -1)  # (N,k*k*D,H*W)
            if need_x and _format(x) == torch.channels_last:
                rows = grad_x[i : i + step].permute(0, 2, 3, 1).flatten(1, 2)
                torch.bmm(g.mT, taps.expand(len(g), -1, -1), out=rows)
            elif need_x:
                torch.bmm(taps.T.expand(len(g), -1, -1), g, out=grad_x[i : i + step].flatten(2))
            if need_weight:
                d_taps += torch.bmm(g, x[i : i + step].flatten(2).mT).sum(0, dtype=torch.float32)
        grad_weight = grad_bias = None
        if need_weight:
            grad_weight = d_taps.view(kh, kw, c_out, c_in).permute(2, 3, 0, 1).flip(2, 3)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        return grad_x, grad_weight, grad_bias


def _symmetric(x, weight, bias):
    """The convolution with k//2 zeros on all sides, which it adds without a copy. For an even k it
    has a row and a column too many: the first ones, and in its transpose the last ones."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=[k // 2 for k in weight.shape[2:]])


def _images(taps, x):
    """How many images of x make a piece."""
    return max(1, _MAPS // (len(taps) * x.shape[2] * x.shape[3]))


def _shifted(by, size):
    """Where the numbers of a line go, and which these are, when it moves `by` places to its start."""
    return slice(max(-by, 0), size - max(by, 0)), slice(max(by, 0), size + min(by, 0))


# --- bfloat16, many channels ----------------------------------------------------------------------


class _Padded(torch.autograd.Function):
    """The plain convolution, with two passes over memory less: F.pad writes zeros everywhere first,
    and copies its gradient, where a view will do."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias):
        left, right, top, bottom = _pads(*weight.shape[2:])
        batch, c_in, height, width = x.shape
        shape = batch, c_in, top + height + bottom, left + width + right
        padded = torch.empty(shape, dtype=x.dtype, memory_format=_format(x))
        padded[:, :, :top], padded[:, :, top + height :] = 0, 0
        padded[:, :, :, :left], padded[:, :, :, left + width :] = 0, 0
        padded[:, :, top : top + height, left : left + width] = x
        ctx.save_for_backward(x, padded, weight)
        return F.conv2d(padded, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, padded, weight = ctx.saved_tensors
        again = torch.is_grad_enabled() or _batched(grad)
        return _plain_backward(grad, x, weight, ctx.needs_input_grad, None if again else padded)


# --- public ---------------------------------------------------------------------------------------


def _pads(kh, kw):
    """(left, right, top, bottom): for an even kernel one more at the end."""
    return (kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2


def _plain_backward(grad, x, weight, need, padded=None):
    """Gradients of x, weight and bias in operations that PyTorch differentiates and slices; `padded`
    is x with its zeros, if it need not do so."""
    left, _, top, _ = pads = _pads(*weight.shape[2:])
    padded = F.pad(x, pads) if padded is None else padded
    once = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, no transpose, groups
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, padded, weight.to(x.dtype), [len(weight)], *once, list(need)
    )
    if dx is not None:
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dweight, dbias


def _batched(grad):
    """Whether this is a stack of gradients, of autograd.grad(..., is_grads_batched=True) and so of
    jacobian(..., vectorize=True), or of torch.vmap: PyTorch slices it only for its own operations."""
    keys = torch._C._dispatch_keys(grad)
    return any(keys.has(torch._C._dispatch_key_parse(k)) for k in ("Batched", "FuncTorchBatched"))


def _format(x):
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def same_conv2d(x, weight, bias=None):
    """conv2d(pad(x), weight, bias), stride 1, as large as x, in x's memory format.

    x (B,C,H,W), weight (D,C,kh,kw), bias (D,) or None; any floating dtype and device. Gradients
    flow to all three.
    """
    path = _path(x, weight, bias)
    if path == "conv2d":
        pads = left, right, top, bottom = _pads(*weight.shape[2:])
        if left == right and top == bottom:  # the convolution pads without a copy
            return F.conv2d(x, weight, bias, padding=(top, left))
        return F.conv2d(F.pad(x, pads), weight, bias)
    if not torch.is_grad_enabled():  # else V would be kept for a backward pass that never comes
        x, weight, bias = (t if t is None else t.detach() for t in (x, weight, bias))
    if path == "winograd":
        return _Winograd.apply(x, weight, bias)
    if path == "padded":
        return _Padded.apply(x.to(_dtype(x)), weight, bias)
    return _FewOut.apply(x.to(_dtype(x)), weight, bias)


def _dtype(x):
    """What the convolution computes in, on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _path(x, weight, bias):
    """Which of "winograd", "few outputs", "padded" and "conv2d" takes these arguments."""
    given = [t for t in (x, weight, bias) if t is not None]
    dtype, autocast = _dtype(x), torch.is_autocast_enabled("cpu")
    taken = (torch.float32, torch.bfloat16)
    if (
        dtype not in taken
        or any(t.dtype not in (taken if autocast else (dtype,)) for t in given)
        or any(t.device.type != "cpu" for t in given)
        or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in given)  # FakeTensor, say
        or torch.compiler.is_compiling()  # it would unroll the pieces
        or torch.jit.is_tracing()  # these must see every step
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return "conv2d"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        return "conv2d"  # which takes an image without a batch, and says what is wrong with others
    (c_out, c_in, k, kw), (batch, _, height, width) = weight.shape, x.shape
    wrong = bias is not None and bias.shape != (c_out,)
    if k != kw or not 3 <= k <= 5 or wrong:
        return "conv2d"
    half = dtype == torch.bfloat16
    if 1 <= c_out <= 4 and c_in >= 32 and height * width >= 1024:
        small = k * k * c_out * height * width <= _MAPS  # those of one image
        pays = not half or batch * height * width >= 8192
        return "few outputs" if small and pays else "conv2d"
    if half:
        large = x.numel() >= 2**21 and _format(x) == torch.channels_last
        return "padded" if k == 4 and large else "conv2d"
    m = _TILE + 1 - k
    tiles = batch * -(-height // m) * -(-width // m)
    enough = min(c_in, c_out) >= 16 and c_in * c_out >= 1024 and tiles >= 96
    return "winograd" if enough else "conv2d"


def _has_amx(x):
    """Whether the CPU multiplies matrices of x's dtype in units of their own."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", bool)  # private to torch, which may drop it
    return _dtype(x) == torch.bfloat16 and supported()
