"""draw_sprites against facts about dSprites that need no download."""

import colorsys
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import sbvae

PUBLISHED_ON = 128_328_862  # pixels on in all 737,280 images: the file's published mean x 64 x 64 x 737,280
FRAMES = [  # published frames: factors, top, left, rows; everything around is off
    ((0, 0, 0, 0, 0), 11, 11, """
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
        ##########
    """),
    ((1, 1, 0, 0, 0), 12, 8, """
        ...##########...
        ..############..
        .##############.
        ################
        ################
        .##############.
        ..############..
        ...##########...
    """),
    ((2, 0, 0, 0, 0), 11, 11, """
        ..#....#..
        .########.
        ##########
        ##########
        .########.
        .########.
        ..######..
        ...####...
        ....##....
    """),
    ((0, 5, 7, 0, 0), 3, 3, """
        ........#.................
        ........###...............
        .......######.............
        .......########...........
        ......###########.........
        ......##############......
        .....#################....
        .....###################..
        .....#####################
        ....#####################.
        ....#####################.
        ...#####################..
        ...#####################..
        ..#####################...
        ..#####################...
        .#####################....
        .#####################....
        #####################.....
        ..###################.....
        ....#################.....
        ......##############......
        .........###########......
        ...........########.......
        .............######.......
        ...............###........
        .................#........
    """),
]


def grid(*ranges):
    return torch.cartesian_prod(*(torch.as_tensor(list(r)) for r in ranges))


@pytest.mark.parametrize("factors, top, left, rows", FRAMES, ids=[str(f[0]) for f in FRAMES])
def test_published_frames(factors, top, left, rows):
    rows = rows.split()
    expected = torch.zeros(64, 64, dtype=torch.bool)
    for i, row in enumerate(rows):
        expected[top + i, left : left + len(row)] = torch.tensor([c == "#" for c in row])
    assert torch.equal(sbvae.draw_sprites(torch.tensor([factors]))[0], expected)
    # negative control: another orientation or the transposed picture is told apart
    wrong = torch.tensor([[factors[0], factors[1], factors[2] + 3, *factors[3:]]])
    assert not torch.equal(sbvae.draw_sprites(wrong)[0], expected)


def outline(shape, scale, orientation):
    """The vertices as the facts state them, in plain Python."""
    if shape == 0:
        points = [(-9.6, -9.6), (9.6, -9.6), (9.6, 9.6), (-9.6, 9.6)]
    elif shape == 1:
        angles = [2 * math.pi * j / 100 for j in range(100)]
        points = [(9.6 * 1.33 * math.cos(t), 9.6 / 1.33 * math.sin(t)) for t in angles]
    else:
        points = []
        for t in (2 * math.pi * j / 150 for j in range(150)):
            v = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((9.6 * math.sin(t) ** 3, -(19.2 / 29 * v + 1.44)))
    angle, size = 2 * math.pi * orientation / 39, 0.5 + 0.1 * scale
    c, s = math.cos(angle), math.sin(angle)
    return [(size * (u * c + v * s), size * (-u * s + v * c)) for u, v in points]


def test_against_an_exact_point_in_polygon_test():
    """Every pixel of 40 random images by even-odd crossing counts in rational arithmetic, one pixel at a time."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([torch.randint(n, (40,), generator=generator) for n in sbvae.SPRITE_SIZES], 1)
    factors[:3, 0] = torch.arange(3)
    for row, image in zip(factors.tolist(), sbvae.draw_sprites(factors), strict=True):
        x, y = (16 + 32 * i / 31 for i in row[3:])
        polygon = [(Fraction(round((x + u) * 256), 256), Fraction(round((y + v) * 256), 256))
                   for u, v in outline(*row[:3])]
        for py in range(64):
            cy = Fraction(2 * py + 1, 2)
            crossings = []
            for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
                if min(y0, y1) < cy <= max(y0, y1):
                    crossings.append(x0 + (cy - y0) * (x1 - x0) / (y1 - y0))
            on = [sum(c <= Fraction(2 * px + 1, 2) for c in crossings) % 2 == 1 for px in range(64)]
            assert image[py].tolist() == on, (row, py)


def test_upright_squares_and_ties_in_closed_form():
    """All 6,144 squares at orientation 0; a centre on a left or bottom edge is in, on a right or top edge out."""
    centres, ties = torch.arange(64) * 256 + 128, 0
    for scale in range(6):
        factors = grid([0], [scale], [0], range(32), range(32))
        half = 9.6 * (0.5 + 0.1 * scale)
        for (*_, x, y), image in zip(factors.tolist(), sbvae.draw_sprites(factors), strict=True):
            left, right, top, bottom = (round((16 + 32 * i / 31 + d) * 256) for i in (x, y) for d in (-half, half))
            expected = ((top < centres) & (centres <= bottom))[:, None] & (left <= centres) & (centres < right)
            ties += any((edge - 128) % 256 == 0 for edge in (left, right, top, bottom))
            assert torch.equal(image, expected)
    assert ties > 100  # the rule above was put to the test


def test_number_of_pixels_on():
    """A stratified sample, every outline at 16 places, estimates the published total within 0.05%."""
    places = range(3, 32, 8)
    on = sbvae.draw_sprites(grid(range(3), range(6), range(40), places, places)).sum().item() * 64
    assert abs(on / PUBLISHED_ON - 1) < 5e-4


def test_the_table_of_all_images():
    """What a GPU looks up, made here: the published number of pixels are on, and a sprite is in its place."""
    table = sbvae.sprite_table(torch.device("cpu"))
    assert table.shape == (*sbvae.SPRITE_SIZES, 64)
    on = sum(np.unpackbits(part.numpy().view(np.uint8)).sum(dtype=int) for part in table.view(-1, 64).split(1024))
    assert abs(on - PUBLISHED_ON) <= 2
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([torch.randint(n, (5000,), generator=generator) for n in sbvae.SPRITE_SIZES], 1)
    drawn = sbvae.draw_sprites(factors)
    assert torch.equal(sbvae.look_up_sprites(factors.int(), table), drawn)
    data = sbvae.Sprites(masks=functools.partial(sbvae.look_up_sprites, table=table))
    images = data.sample(40, torch.Generator().manual_seed(1))
    assert torch.equal(images, sbvae.Sprites().sample(40, torch.Generator().manual_seed(1)))
    # negative control: swapped x and y, or bits from right to left, are told apart
    assert not torch.equal(sbvae.look_up_sprites(factors, table.transpose(3, 4)), drawn)
    assert not torch.equal(sbvae.look_up_sprites(factors, table).flip(-1), drawn)
    sbvae.sprite_table.cache_clear()  # 377 MB


@pytest.mark.parametrize("shape", range(3))
def test_areas(shape):
    """Averaged over places, pixels on equal the area inside the outline (shoelace)."""
    for scale in (0, 5):
        points, size = outline(shape, scale, 11), 0.5 + 0.1 * scale
        ends = points[1:] + points[:1]
        area = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, ends, strict=True))) / 2
        images = sbvae.draw_sprites(grid([shape], [scale], [11], range(32), range(32)))
        assert images.sum().item() / 1024 == pytest.approx(area, rel=2e-3)
        if shape < 2:  # the square's and the ellipse's in closed form
            assert area == pytest.approx((19.2**2, math.pi * 9.6**2)[shape] * size**2, rel=1e-3)


def test_symmetries():
    sizes = (range(3), range(6), [0], range(32), range(32))
    images = sbvae.draw_sprites(grid(*sizes)).view(3, 6, 32, 32, 64, 64)
    again = sbvae.draw_sprites(grid(range(3), range(6), [39], range(32), range(32)))
    assert torch.equal(images.flatten(0, 3), again)  # orientation 39 is orientation 0
    def alike(a, b):
        return (a == b).flatten(-2).all(-1).float().mean().item()

    mirrored = images.flip(2).flip(-1)  # x and 31 - x lie at the same distance from the middle
    assert alike(images, mirrored) > 0.98  # all but ties, where left and right edges differ
    upside_down = images.flip(3).flip(-2)
    assert alike(images[:2], upside_down[:2]) > 0.98
    assert alike(images[2], upside_down[2]) == 0  # a heart has a top and a bottom
    # x moves to the right and y down
    columns = images[0, 0, :, 0].any(1).float().argmax(-1)
    rows = images[0, 0, 0].any(2).float().argmax(-1)
    assert (columns.diff() >= 0).all() and columns[-1] - columns[0] == 32 and torch.equal(rows, columns)


def test_no_host_synchronisation():
    """On the meta device there are no values: whatever needs one on the host raises. So does nothing here, and
    the drawing can be captured in a CUDA graph."""
    factors = torch.zeros(7, 5, dtype=torch.long, device="meta")
    assert sbvae.draw_sprites(factors).shape == (7, 64, 64)
    table = torch.empty(*sbvae.SPRITE_SIZES, 64, dtype=torch.int64, device="meta")
    assert sbvae.look_up_sprites(factors, table).shape == (7, 64, 64)
    images = sbvae.Sprites("meta").sample(7, None)
    assert images.shape == (7, 3, 64, 64) and images.is_meta
    with pytest.raises(RuntimeError):  # negative control
        factors.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_draws_the_same_pixels(compiled):
    """Every shape, scale and orientation at positions that differ from one to the next."""
    factors = torch.cartesian_prod(*map(torch.arange, sbvae.SPRITE_SIZES[:3]))
    n = torch.arange(len(factors))
    factors = torch.cat([factors, torch.stack([n * 7 % 32, n * 13 % 31], 1)], 1)
    data = sbvae.Sprites("cuda")
    masks = torch.compile(data.masks, dynamic=False) if compiled else data.masks
    drawn = masks(factors.cuda()).cpu()
    assert torch.equal(drawn, sbvae.draw_sprites(factors))
    assert not torch.equal(drawn, sbvae.draw_sprites(factors[:, [0, 1, 2, 4, 3]]))  # negative control


def test_compiled_drawing_looks_its_outlines_up():
    """The compiler traces through caches: traced, the table would be made again in each step, on the host."""
    u, graphs = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)), []

    def operations(data):
        graphs.clear()
        torch.compiler.reset()
        paint = torch.compile(data.paint, backend=lambda graph, _: graphs.append(graph) or graph)
        factors = (u[:, :5] * data.sizes).long()
        assert torch.equal(paint(factors, u[:, 5:]), data.paint(factors, u[:, 5:]))
        return {node.target if isinstance(node.target, str) else node.target.__name__
                for graph in graphs for node in graph.graph.nodes}

    found = operations(sbvae.Sprites())
    assert "scatter_add_" in found and "cos" not in found
    assert "cos" in operations(sbvae.Sprites(masks=sbvae.draw_sprites))  # negative control


def test_hsv_to_rgb():
    hsv = torch.rand(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hsv[:8, 0] = torch.arange(8) / 7  # the corners of the hue circle
    expected = torch.tensor([colorsys.hsv_to_rgb(*row) for row in hsv.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sbvae.hsv_to_rgb(hsv), expected)


def test_colored_sprites():
    """A.3: one colour an image, HSV uniform in [0, 1] x [0.3, 0.7]^2; factors uniform; from the generator alone."""
    data = sbvae.load_dataset("sprites")
    assert (data.channels, data.height, data.width, data.size) == (3, 64, 64, None)
    assert len(data.factor_names) == len(data.factor_sizes) == 8
    images = data.sample(3000, torch.Generator().manual_seed(3))
    assert images.shape == (3000, 3, 64, 64) and images.dtype == torch.float32
    assert torch.equal(images, data.sample(3000, torch.Generator().manual_seed(3)))
    assert not torch.equal(images, data.sample(3000, torch.Generator().manual_seed(4)))
    color = images.amax((2, 3))
    assert torch.equal((images > 0).any(1), (images == color[:, :, None, None]).all(1) & (images > 0).all(1))
    hsv = torch.tensor([colorsys.rgb_to_hsv(*c) for c in color.tolist()])
    for column, (low, high) in zip(hsv.T, [(0, 1), (0.3, 0.7), (0.3, 0.7)], strict=True):
        assert low - 1e-5 <= column.min() and column.max() <= high + 1e-5
        counts = column.histc(10, low, high)
        assert ((counts - 300).square() / 300).sum() < 30  # chi-square, 9 degrees of freedom: p = 4e-4
    centroid = ((images > 0).any(1) * torch.arange(64.0)).sum((1, 2)) / (images > 0).any(1).sum((1, 2))
    assert 12 < centroid.min() < 17 and 47 < centroid.max() < 52


def test_factors_of_samples_are_uniform():
    seen = []
    data = sbvae.Sprites(masks=lambda f: seen.append(f) or torch.zeros(len(f), 1, 1, dtype=torch.bool))
    data.sample(40_000, torch.Generator().manual_seed(0))
    for column, size in zip(seen[0].T, sbvae.SPRITE_SIZES, strict=True):
        counts = column.bincount(minlength=size)
        assert len(counts) == size
        chi_squared = ((counts - 40_000 / size) ** 2 / (40_000 / size)).sum()
        assert chi_squared < size - 1 + 5 * math.sqrt(2 * (size - 1))


def test_names_are_those_of_the_columns():
    data = sbvae.Sprites()

    def look(**classes):  # a small square in the upper left, but for these
        usual = dict.fromkeys(data.factor_names, 0) | dict(value=5)
        image = data.draw(torch.tensor([[(usual | classes)[name] for name in data.factor_names]]))[0].amax(0)
        y, x = image.nonzero().double().mean(0).tolist()
        return round(x), round(y), round(image.max().item(), 2), (image > 0).sum().item()

    assert look() == (16, 16, 0.52, 100)
    assert look(x=31) == (48, 16, 0.52, 100) and look(y=31) == (16, 48, 0.52, 100)
    assert look(value=9)[2] == 0.68 and look(saturation=9)[2] == look(hue=9)[2] == 0.52
    assert look(scale=5)[3] == 400 and look(shape=1, scale=5)[3] != 400 != look(orientation=4, scale=5)[3]


def test_draw_takes_the_centres_of_colour_bins():
    data = sbvae.load_dataset("sprites")
    factors = torch.tensor([[1, 5, 3, 9, 20, 7, 2, 9]])
    image = data.draw(factors)
    rgb = torch.tensor(colorsys.hsv_to_rgb(0.75, 0.3 + 0.4 * 0.25, 0.3 + 0.4 * 0.95))
    torch.testing.assert_close(image, sbvae.draw_sprites(factors[:, :5])[:, None] * rgb[:, None, None])


@pytest.mark.parametrize("bad", [
    torch.zeros(3, 4, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.zeros(2, 5),
    torch.zeros(2, 5, dtype=torch.bool), torch.tensor([[0, 0, 0, 0, 32]]), torch.tensor([[-1, 0, 0, 0, 0]])])
def test_bad_factors(bad):
    with pytest.raises(ValueError, match="factors"):
        sbvae.draw_sprites(bad)
    with pytest.raises(ValueError, match="factors"):
        sbvae.Sprites().draw(bad)
    assert sbvae.draw_sprites(torch.zeros(0, 5, dtype=torch.int32)).shape == (0, 64, 64)
