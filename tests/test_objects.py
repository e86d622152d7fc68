"""3D Object-in-Room: the drawings against a second renderer and against the published figures.

The second renderer is written here, in NumPy and float64, and finds everything another way: it
marches along signed distances, takes normals from their differences, and shades one image at a
time from its hues. Wrong drawings (mirrored, swapped, unlit) are shown to fail the same checks.
"""

import colorsys
import math

import numpy as np
import pytest
import torch

import datasets
from datasets import Objects, draw_objects

CPU = torch.device("cpu")
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)
FLOOR, WALL, OBJECT, SCALE, SHAPE, ORIENTATION = range(6)  # columns of the official file


def draw(floor=0, wall=6, hue=3, scale=0, shape=0, orientation=7):
    """One image (64, 64, 3) as float64."""
    factors = torch.tensor([[floor, wall, hue, scale, shape, orientation]])
    return draw_objects(factors)[0].double().numpy()


def shares(scale, shape, orientation):
    """What share of each pixel shows the wall, the floor, the object: (3, 64, 64)."""
    maps, _, _ = datasets._object_tables(CPU)
    return maps[(scale * 4 + shape) * 15 + orientation][[1, 3, 5]].double().numpy()


# ---------------------------------------------------------------------------------------------
# The second renderer
# ---------------------------------------------------------------------------------------------


def object_distance(p, shape, scale):
    """Signed distance from points (3, P) to the object."""
    radius, half = (scale * length for length in datasets.EXTENT[shape])
    x, y, z = p[0], p[1] - half, p[2]
    if shape == CUBE:
        q = np.abs([x, y, z]) - radius
        return np.linalg.norm(q.clip(0), axis=0) + q.max(0).clip(max=0)
    if shape == CYLINDER:
        q = np.stack([np.hypot(x, z) - radius, np.abs(y) - half])
        return np.linalg.norm(q.clip(0), axis=0) + q.max(0).clip(max=0)
    y = y - y.clip(radius - half, half - radius)  # from the nearest point of the inner segment
    return np.sqrt(x**2 + y**2 + z**2) - radius


def scene_distance(p, shape, scale):
    """(distance, part): part is 0 for walls, 1 for the floor, 2 for the object."""
    walls = np.minimum(datasets.WALL_X - np.abs(p[0]), datasets.WALL_Z - np.abs(p[2]))
    parts = np.stack([walls, p[1], object_distance(p, shape, scale)])
    return parts.min(0), parts.argmin(0)


def march(origin, direction, length, distance):
    """Walk along unit rays (3, P) until `distance` is nearly 0 or `length` is reached → (P,)."""
    t = np.zeros(direction.shape[1])
    for _ in range(400):
        step = distance(origin + t * direction)
        t = np.minimum(t + step, length)
        if np.all((step < 1e-7) | (t >= length)):
            break
    return t


def reference(floor, wall, hue, scale, shape, orientation):
    """One image (64, 64, 3) in float64, from the constants in datasets.py."""
    size = 0.75 + 0.5 * scale / 7
    angle = math.radians(-30 + 60 * orientation / 14)
    look = np.array([-math.sin(angle), 0, math.cos(angle)])
    right = np.array([math.cos(angle), 0, math.sin(angle)])
    eye = np.array([0.0, 1, 0]) - datasets.ORBIT * look
    n = 64 * datasets.SAMPLES
    row, column = (np.indices((n, n)).reshape(2, -1) + 0.5) / datasets.SAMPLES
    ray = (look[:, None] + (column - 32) / datasets.FOCAL * right[:, None]
           + (datasets.HORIZON - row) / datasets.FOCAL * np.array([[0.0], [1], [0]]))
    ray /= np.linalg.norm(ray, axis=0)
    t = march(eye[:, None], ray, 30, lambda p: scene_distance(p, shape, size)[0])
    p = eye[:, None] + t * ray
    part = scene_distance(p, shape, size)[1]
    normal = np.stack([scene_distance(p - 1e-4 * ray + e[:, None], shape, size)[0]
                       - scene_distance(p - 1e-4 * ray - e[:, None], shape, size)[0]
                       for e in 1e-5 * np.eye(3)])
    normal /= np.linalg.norm(normal, axis=0).clip(1e-12)

    to_lamp = np.array(datasets.LAMP)[:, None] - p
    far = np.linalg.norm(to_lamp, axis=0)
    to_lamp /= far
    cosine = (normal * to_lamp).sum(0)
    start = p + 1e-3 * normal
    free = march(start, to_lamp, far, lambda q: object_distance(q, shape, size)) >= far
    lamp = datasets.SPOT * cosine.clip(0) * to_lamp[1].clip(0) ** datasets.FALLOFF
    light = datasets.AMBIENT + datasets.FRONT * (-normal.T @ look).clip(0)
    light = light + np.where((part == 1) & ~free, 0, lamp)
    rgb = np.array([colorsys.hsv_to_rgb(k / 10, 1, 1) for k in (wall, floor, hue)])[part].T
    gloss = datasets.GLOSS * (18 * cosine + 0.8).clip(0, 1) * (part == 2)
    # The texture's look was matched by eye, and is shared; where it lies is found anew: to the
    # right of someone who stands in the room and looks at a wall.
    side = (part == 0) & (datasets.WALL_X - np.abs(p[0]) < 1e-4)
    along = np.where(part == 1, p[2], np.where(side, -np.sign(p[0]) * p[2], p[0]))
    texture = datasets._pattern(*map(torch.from_numpy, (
        along, np.where(part == 1, p[0], p[1]), (part == 0) & (p[1] < datasets.WALL_HEIGHT))))
    light = np.where(part == 2, light, texture.numpy() * light)
    image = np.minimum(rgb * light + gloss, 1)
    sky = np.array([[153.0], [226], [249]]) / 255
    image = np.where((part == 0) & (p[1] > datasets.WALL_HEIGHT), sky, image)
    m = datasets.SAMPLES
    return image.reshape(3, 64, m, 64, m).mean((2, 4)).transpose(1, 2, 0)


@pytest.mark.parametrize("factors", [(1, 6, 3, 0, CUBE, 0), (3, 8, 5, 7, CYLINDER, 3),
                                     (6, 2, 0, 4, SPHERE, 9), (2, 4, 9, 5, CAPSULE, 14)])
def test_equals_a_second_renderer(factors):
    ours, theirs = draw(*factors), reference(*factors)
    difference = np.abs(ours - theirs)
    # Ours saturate pixel by pixel, those of the reference sample by sample.
    assert difference.mean() < 0.001
    assert np.quantile(difference, 0.999) < 0.06
    for wrong in (ours[:, ::-1], ours[::-1], ours[..., ::-1], ours.transpose(1, 0, 2),
                  0.9 * ours, np.roll(ours, 1, 0), np.roll(ours, 1, 1),
                  *(draw(*(f if i != k else f - 1 if f else 1 for k, f in enumerate(factors)))
                    for i in range(6))):
        assert np.abs(wrong - theirs).mean() > 0.003  # each factor one class off, among others


# ---------------------------------------------------------------------------------------------
# Published and measured figures
# ---------------------------------------------------------------------------------------------


def test_mean_of_the_whole_grid_is_the_published_one():
    # Each part's pixels depend on its own hue alone, so that the mean over all 10 x 10 x 10 hues
    # is the mean over the 10 where the three agree: 4,800 images stand for 480,000.
    geometry = torch.cartesian_prod(torch.arange(8), torch.arange(4), torch.arange(15))
    mean = torch.zeros(3, dtype=torch.float64)
    for k in range(10):
        hues = torch.full((len(geometry), 3), k)
        mean += draw_objects(torch.cat([hues, geometry], 1)).double().mean((0, 1, 2)) / 10
    published = torch.tensor([0.502585, 0.578760, 0.603450], dtype=torch.float64)
    assert (mean - published).abs().max() < 0.003
    assert (mean.flip(0) - published).abs().max() > 0.02


def test_room_lies_where_it_was_measured():
    wall, floor, thing = shares(0, SPHERE, 7)
    sky = (1 - wall - floor - thing).sum(0)  # rows of sky per column: where the wall's top is
    assert abs(datasets.HORIZON - 32.45) < 0.5
    assert abs(sky[5] - 17.6) < 0.5 and abs(64 - floor[:, 5].sum() - 40.3) < 1
    assert np.ptp(sky) < 1e-3  # only the back wall is in view
    for orientation, corner, edge in ((0, 43.5, 0), (14, 20.5, 63)):
        wall, floor, thing = shares(0, SPHERE, orientation)
        sky = (1 - wall - floor - thing).sum(0)
        assert abs(sky.argmax() + 0.5 - corner) < 1 and abs(sky.max() - 20.0) < 0.5
        assert abs(sky[edge] - 15.7) < 0.5
        # The corner is where brightness jumps: the side wall is darker.
        row = draw(orientation=orientation, shape=SPHERE)[26, :, 2]
        assert abs(np.abs(row[1:] - row[:-1]).argmax() + 1 - corner) < 1
        side, back = row[45:], row[:42]
        if orientation == 14:
            side, back = row[:19], row[22:]
        assert side.max() < 0.9 * back.min()


@pytest.mark.parametrize("shape, smallest, largest", [
    (CUBE, (16, 17), (29, 29)), (CYLINDER, (16, 18), (27, 30)),
    (SPHERE, (16, 17), (29, 29)), (CAPSULE, (12, 26), (22, 45))])
def test_sizes_in_pixels(shape, smallest, largest):
    for scale, (width, height) in ((0, smallest), (7, largest)):
        covered = shares(scale, shape, 7)[2]
        assert abs((covered.max(0) > 0.75).sum() - width) <= 1
        assert abs((covered.max(1) > 0.75).sum() - height) <= 1
    heights = [(shares(scale, CAPSULE, 7)[2].max(1) > 0.75).sum() for scale in range(8)]
    assert np.abs(np.array(heights) - [26, 28, 32, 34, 37, 40, 42, 45]).max() <= 1


@pytest.mark.parametrize("scale", [0, 7])
def test_objects_stand_on_the_floor(scale):
    # The lowest row is the foot's nearest point, or for round feet the tangent to a sphere.
    size = 0.75 + 0.5 * scale / 7
    for shape in (CUBE, CYLINDER, SPHERE, CAPSULE):
        radius, half = (size * length for length in datasets.EXTENT[shape])
        lowest = np.nonzero(shares(scale, shape, 7)[2].max(1) > 0)[0].max() + 1
        if shape in (CUBE, CYLINDER):
            slope = 1 / (datasets.ORBIT - radius)
        else:
            depth, drop = datasets.ORBIT, 1 - radius
            slope = math.tan(math.atan2(drop, depth) + math.asin(radius / math.hypot(depth, drop)))
        assert -0.35 < lowest - (datasets.HORIZON + datasets.FOCAL * slope) < 1
        highest = np.nonzero(shares(scale, shape, 7)[2].max(1) > 0)[0].min()
        assert lowest - highest > datasets.FOCAL * 1.5 * half / datasets.ORBIT  # not sunk in


def test_geometry_is_mirrored_and_light_is_not():
    for shape in range(4):
        for orientation in range(7):
            left, right = shares(3, shape, orientation), shares(3, shape, 14 - orientation)
            assert np.abs(left[:, :, ::-1] - right).mean() < 1e-3
            if shape == CUBE or orientation == 0:
                assert np.abs(left - right).mean() > 1e-3
            light = draw(scale=3, shape=shape, orientation=orientation)
            other = draw(scale=3, shape=shape, orientation=14 - orientation)
            assert np.abs(light[:, ::-1] - other).mean() > 0.01


def test_orientation_turns_the_camera():
    # At -30 degrees the side wall is at the right, and it moves out of the picture before 0.
    # Left sides of the cube face the lamp: brighter than its front, right ones are darker.
    walls = [draw(orientation=k)[26, [3, 60], 2] for k in range(15)]
    assert walls[0][0] > 1.15 * walls[0][1] and walls[14][1] > 1.15 * walls[14][0]
    assert abs(walls[7][0] / walls[7][1] - 1) < 0.1
    first, last = draw(orientation=0)[46], draw(orientation=14)[46]
    assert first[24, 1] > first[35, 1] > 1.2 * last[39, 1]
    assert first[24, 2] > 0.05 and last[39, 2] < 0.01  # gloss on the lit side alone
    # In between it turns by equal angles: the corner's column, from the two walls' directions.
    for k in range(3):
        angle = math.radians(30 - 60 * k / 14)
        x = datasets.WALL_X + datasets.ORBIT * math.sin(angle)  # of the corner, from the camera
        z = datasets.WALL_Z + datasets.ORBIT * math.cos(angle)
        column = 32 + datasets.FOCAL * math.tan(math.atan2(x, z) - angle)
        row = draw(shape=SPHERE, orientation=k)[26, :, 2]
        assert abs(np.abs(row[1:] - row[:-1]).argmax() + 1 - column) < 1


def test_shadow_lies_where_the_lamp_puts_it():
    size, orientation = 1.25, 7
    image = draw(floor=0, scale=7, shape=SPHERE, orientation=orientation)
    radius = size * datasets.EXTENT[SPHERE][0]
    lamp, center = np.array(datasets.LAMP), np.array([0, radius, 0])
    row, column = np.indices((64, 64)) + 0.5
    depth = datasets.FOCAL / (row - datasets.HORIZON)  # where the floor is seen, if below horizon
    floor = np.stack([(column - 32) / datasets.FOCAL * depth, 0 * row, depth - datasets.ORBIT], -1)
    along = floor - lamp  # a point is in shadow if its ray to the lamp passes within the radius
    cross = np.linalg.norm(np.cross(along, center - lamp), axis=-1)
    miss = cross / np.linalg.norm(along, axis=-1)
    visible = (shares(7, SPHERE, orientation)[1] > 0.99) & (row > 44)
    inside, outside = visible & (miss < radius - 0.06), visible & (miss > radius + 0.06)
    assert inside.sum() > 60
    assert np.abs(image[inside][:, 0] - 0.983 * datasets.AMBIENT).max() < 0.02
    assert image[outside][:, 0].min() > 0.6


# ---------------------------------------------------------------------------------------------
# Colors
# ---------------------------------------------------------------------------------------------


def test_hues_are_those_of_the_factors():
    for k in range(10):
        hue = np.array(colorsys.hsv_to_rgb(k / 10, 1, 1))
        for pixel in (draw(floor=k)[61, 63], draw(wall=k, orientation=0)[25, 60],
                      draw(hue=k, scale=7)[50, 32]):
            assert 0.3 < pixel.max() < 1  # not saturated: the color is hue x brightness exactly
            np.testing.assert_allclose(pixel / pixel.max(), hue, atol=1e-6)
    np.testing.assert_allclose(draw()[:8] * 255, np.broadcast_to([153, 226, 249], (8, 64, 3)),
                               atol=1e-3)


def test_each_hue_paints_its_own_part():
    base = dict(floor=0, wall=5, hue=3, scale=5, shape=SPHERE, orientation=4)
    image, parts = draw(**base), shares(5, SPHERE, 4)
    for name, part in (("wall", 0), ("floor", 1), ("hue", 2)):
        changed = np.abs(draw(**{**base, name: 8}) - image).max(-1) > 1e-6
        assert (changed == (parts[part] > 0)).all()
    geometry = [draw(**{**base, name: 6}) for name in ("scale", "orientation")]
    assert all(np.abs(g - image).mean() > 0.003 for g in geometry)


def test_edges_are_anti_aliased():
    covered = shares(4, SPHERE, 7)[2]
    edge = covered[(covered > 0) & (covered < 1)]
    assert len(edge) > 40 and len(np.unique(edge.round(4))) >= 6
    # Area to 0.3 % against the closed form: the cone around a sphere cuts the image in an ellipse.
    radius = datasets.EXTENT[SPHERE][0] * datasets.SCALES[4]
    depth, drop = datasets.ORBIT, 1 - radius
    tilt, half = math.atan2(drop, depth), math.asin(radius / math.hypot(depth, drop))
    near, far = math.tan(tilt + half), math.tan(tilt - half)
    major = (near - far) / 2  # semi-axes in the image plane at depth 1
    minor = math.sin(half) * math.sqrt(1 / (math.cos(tilt + half) * math.cos(tilt - half)))
    assert covered.sum() == pytest.approx(math.pi * major * minor * datasets.FOCAL**2, rel=0.003)


# ---------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------


def test_interface_of_the_data_set():
    data = Objects()
    assert (data.name, data.size, len(data)) == ("objects", 480_000, 480_000)
    assert data.on_device is True and data.device == CPU
    assert (data.channels, data.height, data.width) == (3, 64, 64)
    assert data.factor_names == ("floor hue", "wall hue", "object hue", "scale", "shape",
                                 "orientation")
    assert data.factor_sizes == (10, 10, 10, 8, 4, 15) and math.prod(data.factor_sizes) == data.size
    factors = torch.stack([torch.arange(32) % size for size in data.factor_sizes], 1)
    images = data.draw(factors)
    assert images.shape == (32, 3, 64, 64) and images.dtype == torch.float32
    assert images.is_contiguous() and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images.permute(0, 2, 3, 1), draw_objects(factors.int()))
    assert torch.equal(images[5:6], data.draw(factors[5:6]))  # whatever else is in the batch
    assert data.draw(factors[:0]).shape == (0, 3, 64, 64)


def test_sample_is_uniform_and_depends_on_the_generator_alone():
    data = Objects()
    torch.manual_seed(1)
    first = data.sample(8, torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(data.sample(8, generator), first)
    assert not torch.equal(data.sample(8, generator), first)
    state = generator.get_state()
    following = data.sample(3, generator)
    generator.set_state(state)
    assert torch.equal(data.sample(3, generator), following)
    # All classes of all factors come, equally often: recover the factors of the images drawn.
    drawn = []
    data.draw = lambda factors: drawn.append(factors)
    data.sample(30_000, generator)
    for column, size in zip(drawn[0].T, data.factor_sizes, strict=True):
        counts = torch.bincount(column, minlength=size)
        assert len(counts) == size
        chi_squared = ((counts - 30_000 / size) ** 2 / (30_000 / size)).sum()
        assert chi_squared < size - 1 + 5 * math.sqrt(2 * (size - 1))


def test_command_line(tmp_path, capsys):
    for arguments in ([], ["a.png", "b.png"], [str(tmp_path / "nodir" / "x.png")]):
        assert datasets.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert datasets.main([str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("factors, says", [
    (torch.zeros(2, 5, dtype=torch.int64), "(N, 6)"),
    (torch.zeros(6, dtype=torch.int64), "(N, 6)"),
    (torch.zeros(2, 6), "integer"),
    (torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 4, 0]]), "factors[1, 4] is 4"),
    (torch.tensor([[0, 0, 0, 8, 0, 0]]), "0..7"),
    (torch.tensor([[0, -1, 0, 0, 0, 0]]), "factors[0, 1] is -1"),
    (torch.tensor([[0, 0, 0, 0, 0, 15]]), "0..14")])
def test_bad_factors(factors, says):
    for function in (draw_objects, Objects().draw):
        with pytest.raises(ValueError) as error:
            function(factors)
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same_and_can_be_captured():
    data = Objects("cuda")
    factors = torch.stack([torch.arange(64) % size for size in data.factor_sizes], 1)
    torch.testing.assert_close(data.draw(factors.cuda()).cpu(), Objects().draw(factors),
                               atol=1e-6, rtol=0)
    generator = torch.Generator("cuda").manual_seed(0)
    expected = data.sample(16, generator).clone()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator.manual_seed(0))
    with torch.cuda.graph(graph):
        images = data.sample(16, generator)
    generator.manual_seed(0)
    graph.replay()
    assert torch.equal(images, expected)
