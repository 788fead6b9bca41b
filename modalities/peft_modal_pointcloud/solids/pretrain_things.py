"""Pre-training families of things: vessels, tools, vehicles, a tree, and random assemblies.

Each function appends the primitives of all its instances at once: proportions are uniform draws, options are coin
flips that switch primitives off. Lengths are in arbitrary units, since every cloud is scaled to the unit sphere.
"""

from __future__ import annotations

import math

import torch

from peft_modal_pointcloud.solids.assembly import (
    ALONG_X,
    ALONG_Z,
    CORNERS,
    FULL_TURN,
    Assembly,
    turn_about,
)
from peft_modal_pointcloud.solids.primitives import BOX, ELLIPSOID, FRUSTUM


def mug(make: Assembly) -> None:
    """An open cup with a bowed or a square handle; saucer and rim are optional."""
    radius, height, taper = make.uniform(0.3, 0.5), make.uniform(0.6, 1.1), make.uniform(0.65, 1.0)
    make.frustum(radius * taper, radius, height, (0.0, height / 2, 0.0), caps="bottom")
    inner = radius * make.uniform(0.82, 0.92)
    make.frustum(inner * taper, inner, height * 0.92, (0.0, height * 0.54, 0.0), caps="bottom", on=make.chance(0.6))
    is_bowed, tube = make.chance(0.65), make.uniform(0.03, 0.06)
    half, middle = height * make.uniform(0.24, 0.36), height * make.uniform(0.48, 0.56)
    reach = make.uniform(0.16, 0.3)
    wall = radius * (1 + taper) / 2
    make.torus(
        reach,
        tube,
        (wall, middle, 0.0),
        arc=math.pi,
        stretch=half / reach,
        turn=turn_about("x", math.pi / 2),
        on=is_bowed,
    )
    low, high, out = middle - half, middle + half, wall + reach
    make.rod((wall, low, 0.0), (out, low, 0.0), tube, on=~is_bowed)
    make.rod((wall, high, 0.0), (out, high, 0.0), tube, on=~is_bowed)
    make.rod((out, low, 0.0), (out, high, 0.0), tube, on=~is_bowed)
    saucer = make.chance(0.3)
    make.frustum(radius * 1.1, radius * make.uniform(1.6, 2.0), 0.1, (0.0, 0.02, 0.0), caps="bottom", on=saucer)
    make.torus(radius, make.uniform(0.015, 0.03), (0.0, height, 0.0), on=make.chance(0.5))


def aeroplane(make: Assembly) -> None:
    """Fuselage along x, swept or straight wings high or low, tail, and none, two or four engines or a propeller."""
    length, radius, is_tube = make.uniform(1.7, 2.3), make.uniform(0.1, 0.19), make.chance(0.65)
    make.ellipsoid((length / 2, radius, radius), (0.0, 0.0, 0.0), on=~is_tube)
    make.frustum(radius, radius, length * 0.6, (0.0, 0.0, 0.0), turn=ALONG_X, caps="none", on=is_tube)
    nose = turn_about("z", -math.pi / 2)
    make.ellipsoid((radius, length * 0.14, radius), (length * 0.3, 0.0, 0.0), turn=nose, lowest=0.0, on=is_tube)
    tail = (-length * 0.42, radius * 0.3, 0.0)
    make.frustum(radius * 0.3, radius, length * 0.24, tail, turn=ALONG_X, on=is_tube)
    sweep, span, chord = make.uniform(0.0, 0.6), make.uniform(0.75, 1.2), make.uniform(0.24, 0.42)
    wing_x, wing_y = length * make.uniform(-0.02, 0.12), radius * (2 * make.uniform(0.0, 1.0) - 1) * 0.8
    dihedral = make.uniform(-0.03, 0.12)
    tail_y, fin = torch.where(make.chance(0.25), 1.0, 0.1), make.uniform(0.28, 0.45)
    for z in (-1, 1):
        centre = (wing_x - sweep.sin() * span / 2, wing_y + dihedral * span / 2, z * sweep.cos() * span / 2)
        make.box((chord, 0.035, span), centre, turn=turn_about("y", -z * sweep) @ turn_about("x", -z * dihedral))
        plane = (-length * 0.45 - sweep.sin() * span * 0.16, radius * 0.5 + tail_y * fin, z * sweep.cos() * span * 0.17)
        make.box((chord * 0.55, 0.03, span * 0.34), plane, turn=turn_about("y", -z * sweep))
    make.board(
        (-length * 0.42, radius * 0.3, 0.0),
        (-length * 0.42 - sweep.sin() * fin, radius * 0.5 + fin, 0.0),
        chord * 0.6,
        0.03,
    )
    engines = make.integer(0, 2)
    for pair, share in ((1, 0.33), (2, 0.62)):
        for z in (-1, 1):
            at = (wing_x - sweep.sin() * span * share + 0.12, wing_y - 0.1, z * sweep.cos() * span * share)
            make.frustum(0.055, 0.075, 0.3, at, turn=ALONG_X, on=engines >= pair)
    make.box(
        (0.03, make.uniform(0.5, 0.8), 0.06),
        (length * 0.46, 0.0, 0.0),
        turn=turn_about("x", make.uniform(0.0, 3.1)),
        on=(engines == 0) & make.chance(0.7),
    )


def bottle(make: Assembly) -> None:
    """A round, square or bulbous body, shoulder, neck and cap; some with a handle."""
    radius, height, body = make.uniform(0.22, 0.4), make.uniform(0.7, 1.3), make.integer(0, 3)
    neck, shoulder, throat = make.uniform(0.06, 0.14), make.uniform(0.08, 0.4), make.uniform(0.12, 0.4)
    waist = make.uniform(0.75, 1.0)
    bulb = body == 3
    make.frustum(radius, radius, height, (0.0, height / 2, 0.0), caps="bottom", on=body == 0)
    make.box((2 * radius, height, 2 * radius * waist), (0.0, height / 2, 0.0), on=body == 1)
    make.frustum(radius, radius * waist, height / 2, (0.0, height / 4, 0.0), caps="bottom", on=body == 2)
    make.frustum(radius * waist, radius, height / 2, (0.0, height * 0.75, 0.0), caps="none", on=body == 2)
    make.ellipsoid((radius * 1.3, height / 2, radius * 1.3), (0.0, height / 2, 0.0), on=bulb)
    below = radius * torch.where(body == 1, waist, 1.0)
    make.frustum(below, neck, shoulder, (0.0, height + shoulder / 2, 0.0), caps="none", on=~bulb)
    top = torch.where(bulb, height * 0.96, height + shoulder)
    make.frustum(neck, neck, throat, (0.0, top + throat / 2, 0.0), caps="top")
    lip = neck * make.uniform(1.15, 1.5)
    make.frustum(lip, lip, make.uniform(0.06, 0.16), (0.0, top + throat, 0.0), on=make.chance(0.7))
    make.torus(throat * 0.7, 0.03, (neck, top, 0.0), arc=math.pi * 1.1, turn=ALONG_Z, on=make.chance(0.15))
    base = radius * torch.where(bulb, 0.8, 1.06)
    make.frustum(base, base, 0.05, (0.0, 0.03, 0.0), on=(body != 1) & make.chance(0.4))


def car(make: Assembly) -> None:
    """Saloon, van or pick-up along x: body, cabin with slanted screens, four wheels; spoiler, roof rack."""
    length, width, low = make.uniform(1.7, 2.3), make.uniform(0.75, 0.95), make.uniform(0.26, 0.42)
    wheel, style, roof = make.uniform(0.15, 0.23), make.integer(0, 2), make.uniform(0.26, 0.5)
    floor = wheel * make.uniform(0.7, 1.1)
    top = floor + low
    make.box((length, low, width), (0.0, floor + low / 2, 0.0))
    van, pickup = style == 1, style == 2
    roof = torch.where(van, roof * 1.5, roof)
    front = length * torch.where(van, 0.3, make.uniform(0.05, 0.16))
    rear = -length * torch.where(van, 0.48, torch.where(pickup, 0.12, make.uniform(0.2, 0.44)))
    cabin = width * make.uniform(0.82, 0.96)
    make.box((front - rear, roof, cabin), ((front + rear) / 2, top + roof / 2, 0.0))
    slant = make.uniform(0.12, 0.34)
    make.board((front + slant, top, 0.0), (front, top + roof, 0.0), 0.03, cabin)
    make.board((rear - slant * 0.8, top, 0.0), (rear, top + roof, 0.0), 0.03, cabin, on=(style == 0) & make.chance(0.6))
    bed = rear + length / 2
    make.box((bed, 0.2, width), (rear - bed / 2, top + 0.1, 0.0), is_open=1.0, on=pickup)
    base = length * make.uniform(0.28, 0.34)
    thick = make.uniform(0.12, 0.2)
    for x, z in CORNERS:
        at = (x * base, wheel, z * (width / 2 - thick * 0.3))
        make.frustum(wheel, wheel, thick, at, turn=ALONG_Z)
    spoiler = (style == 0) & make.chance(0.25)
    make.box((0.16, 0.03, width * 0.9), (-length * 0.46, top + 0.16, 0.0), on=spoiler)
    make.box((0.05, 0.16, width * 0.6), (-length * 0.46, top + 0.08, 0.0), on=spoiler)
    make.box(
        ((front - rear) * 0.8, 0.05, cabin * 0.8), ((front + rear) / 2, top + roof + 0.07, 0.0), on=make.chance(0.2)
    )


def ring(make: Assembly) -> None:
    """A thin or thick ring or a flat band, lying or upright; round or oval; with a stone, or two rings linked."""
    tube, stretch = make.uniform(0.04, 0.28), torch.where(make.chance(0.4), make.uniform(1.1, 1.6), 1.0)
    band, upright, linked = make.chance(0.25), make.chance(0.5), make.chance(0.2)
    turn = torch.where(upright[:, None, None], turn_about("x", math.pi / 2), torch.eye(3))
    turn = turn @ turn_about("y", make.uniform(0.0, FULL_TURN))
    make.torus(0.7, tube, (0.0, 0.0, 0.0), stretch=stretch, turn=turn, on=~band)
    tall = make.uniform(0.15, 0.6)
    make.frustum(0.7, 0.7, tall, (0.0, 0.0, 0.0), turn=turn, caps="none", on=band)
    make.frustum(0.6, 0.6, tall, (0.0, 0.0, 0.0), turn=turn, caps="none", on=band & make.chance(0.6))
    far = turn[:, :, 0] * 0.75
    stone, size = ~linked & make.chance(0.4), make.uniform(0.12, 0.26)
    at = (far[:, 0], far[:, 1], far[:, 2])
    is_round = make.chance(0.5)
    make.ellipsoid((size, size, size), at, on=stone & is_round)
    make.box((1.5 * size, 1.5 * size, 1.5 * size), at, turn=turn @ turn_about("z", 0.785), on=stone & ~is_round)
    make.torus(0.65, tube.clamp(max=0.15), at, turn=turn @ turn_about("x", math.pi / 2), on=linked & ~band)


def dumbbell(make: Assembly) -> None:
    """A bar along x between two spheres, blocks, or stacks of discs; short for one hand or long."""
    half, bar, style = make.uniform(0.35, 1.0), make.uniform(0.03, 0.07), make.integer(0, 2)
    weight = make.uniform(0.2, 0.42)
    make.rod((-half - 0.1, 0.0, 0.0), (half + 0.1, 0.0, 0.0), bar)
    thick, second = make.uniform(0.06, 0.16), make.chance(0.7)
    smaller = weight * make.uniform(0.55, 0.9)
    long = weight * make.uniform(1.0, 1.7)
    for x in (-1, 1):
        make.ellipsoid((weight, weight, weight), (x * half, 0.0, 0.0), on=style == 0)
        make.box((long, 1.5 * weight, 1.5 * weight), (x * half, 0.0, 0.0), on=style == 1)
        make.frustum(weight, weight, thick, (x * half, 0.0, 0.0), turn=ALONG_X, on=style == 2)
        at = (x * (half - thick * 1.15), 0.0, 0.0)
        make.frustum(smaller, smaller, thick, at, turn=ALONG_X, on=(style == 2) & second)
    make.ellipsoid((half * 0.5, bar * 1.7, bar * 1.7), (0.0, 0.0, 0.0), on=make.chance(0.4))


def hammer(make: Assembly) -> None:
    """A handle and a head: claw, ball, wedge or sledge, or a wooden mallet."""
    length, grip, style = make.uniform(0.9, 1.6), make.uniform(0.03, 0.06), make.integer(0, 4)
    make.rod((0.0, 0.0, 0.0), (0.0, length, 0.0), grip * make.uniform(1.0, 1.4), end_radius=grip)
    sleeve = grip * 1.6
    make.frustum(sleeve, sleeve, length * 0.35, (0.0, length * 0.18, 0.0), on=make.chance(0.5))
    head, reach = make.uniform(0.07, 0.12), make.uniform(0.22, 0.34)
    heavy = style >= 3
    make.box((reach, 1.8 * head, 1.8 * head), (0.0, length, 0.0), on=~heavy)
    make.frustum(head * 1.2, head, 0.16, (-reach / 2 - 0.08, length, 0.0), turn=ALONG_X, on=~heavy)
    for z in (-1, 1):
        turn = turn_about("y", -z * 0.18) @ turn_about("x", -math.pi / 2) @ turn_about("y", -math.pi / 4)
        at = (reach * 0.5, length - 0.3, z * head * 0.4)
        make.torus(0.3, 0.035, at, arc=math.pi / 2, turn=turn, on=style == 0)
    make.ellipsoid((head, head, head), (reach / 2 + head * 0.7, length, 0.0), on=style == 1)
    make.board((reach / 2, length, 0.0), (reach / 2 + 0.28, length - 0.05, 0.0), 0.06, 2 * head, on=style == 2)
    big = make.uniform(0.14, 0.26)
    make.frustum(big, big, make.uniform(0.5, 0.85), (0.0, length, 0.0), turn=ALONG_X, on=style == 3)
    make.box((make.uniform(0.5, 0.8), 1.6 * big, 1.6 * big), (0.0, length, 0.0), on=style == 4)


def tree(make: Assembly) -> None:
    """A conifer of stacked cones, a broad crown of one to three balls with a branch, or a palm."""
    style, trunk, height = make.integer(0, 2), make.uniform(0.06, 0.13), make.uniform(0.5, 1.1)
    conifer, broad, palm = style == 0, style == 1, style == 2
    height = torch.where(palm, height * 1.5, torch.where(conifer, height * 0.4, height))
    lean = torch.where(palm, make.uniform(-0.3, 0.3), 0.0)
    make.rod((0.0, 0.0, 0.0), (lean, height, 0.0), trunk * 1.3, end_radius=trunk * 0.8)
    cones, spread, step = make.integer(2, 4), make.uniform(0.4, 0.65), make.uniform(0.32, 0.5)
    for k in range(4):
        size = spread * (1 - 0.2 * k)
        make.frustum(
            size, 0.02, step * 1.5, (0.0, height + step * (k + 0.75), 0.0), caps="bottom", on=conifer & (k < cones)
        )
    balls = make.integer(1, 3)
    for k, (x, y, z) in enumerate(((0.0, 0.3, 0.0), (0.3, 0.1, 0.15), (-0.28, 0.15, -0.2))):
        size = make.uniform(0.32, 0.58) * (1.0 if k == 0 else 0.75)
        radii = (size, size * make.uniform(0.75, 1.3), size)
        make.ellipsoid(radii, (x, height + y, z), on=broad & (k < balls))
    make.rod((0.0, height * 0.6, 0.0), (0.4, height * 1.05, 0.1), trunk * 0.6, on=broad & make.chance(0.6))
    droop = make.uniform(0.1, 0.6)
    for k in range(5):
        angle = make.uniform(-0.25, 0.25) + k * FULL_TURN / 5
        turn = turn_about("y", angle) @ turn_about("z", -droop)
        at = (lean + 0.38 * angle.cos(), height - 0.38 * droop.sin(), -0.38 * angle.sin())
        make.ellipsoid((0.42, 0.03, 0.11), at, turn=turn, on=palm)


def snowman(make: Assembly) -> None:
    """Two or three balls of decreasing size, hat, carrot nose, stick arms, scarf, broom."""
    base, shrink, three = make.uniform(0.4, 0.6), make.uniform(0.65, 0.8), make.chance(0.7)
    middle = torch.where(three, base * shrink, base)
    head = middle * shrink
    middle_y = base + torch.where(three, (base + middle) * 0.82, 0.0)
    head_y = middle_y + (middle + head) * 0.82
    make.ellipsoid((base, base * 0.95, base), (0.0, base * 0.92, 0.0))
    make.ellipsoid((middle, middle, middle), (0.0, middle_y, 0.0), on=three)
    make.ellipsoid((head, head, head), (0.0, head_y, 0.0))
    hat, hat_y, tall = make.chance(0.7), head_y + head * 0.85, make.uniform(0.2, 0.4)
    make.frustum(head * 1.15, head * 1.15, 0.04, (0.0, hat_y, 0.0), on=hat)
    crown = head * make.uniform(0.55, 0.8)
    make.frustum(crown, crown * make.uniform(0.7, 1.1), tall, (0.0, hat_y + tall / 2, 0.0), on=hat)
    make.rod((0.0, head_y, head * 0.9), (0.0, head_y, head + make.uniform(0.15, 0.35)), 0.05, end_radius=0.005)
    arms, lift = make.chance(0.75), make.uniform(-0.1, 0.4)
    for x in (-1, 1):
        make.rod((x * middle * 0.9, middle_y, 0.0), (x * (middle + 0.5), middle_y + lift, 0.1), 0.025, on=arms)
    neck = middle_y + middle * 0.86
    make.torus(head * 0.72, 0.07, (0.0, neck, 0.0), on=make.chance(0.5))
    broom, hand = arms & make.chance(0.35), middle + 0.5
    make.rod((hand, 0.0, 0.1), (hand, head_y, 0.1), 0.025, on=broom)
    make.frustum(0.15, 0.05, 0.3, (hand, 0.15, 0.1), on=broom)


def random_assembly(make: Assembly) -> None:
    """Two to six primitives of any kind, size and pose, so that local shapes are not tied to the named families."""
    count = make.integer(2, 6)
    for k in range(6):
        kind = make.integer(0, 3)
        a, b, c = make.uniform(0.08, 0.55), make.uniform(0.08, 0.55), make.uniform(0.08, 0.55)
        is_box, is_frustum, is_ellipsoid = kind == BOX, kind == FRUSTUM, kind == ELLIPSOID
        tube = torch.where(is_box | is_frustum | is_ellipsoid, b, b * 0.25)
        third = torch.where(is_box | is_frustum | is_ellipsoid, c, make.uniform(1.5, FULL_TURN))
        open_top = make.chance(0.3).float()
        caps = make.integer(0, 3).float()
        lowest = torch.where(make.chance(0.5), -1.0, make.uniform(-0.8, 0.3))
        stretch = make.uniform(1.0, 1.6)
        fourth = torch.where(
            is_box, open_top, torch.where(is_frustum, caps, torch.where(is_ellipsoid, lowest, stretch))
        )
        at = (make.uniform(-0.6, 0.6), make.uniform(-0.6, 0.6), make.uniform(-0.6, 0.6))
        make.primitive(kind, [a, tube, third, fourth], at, turn=make.any_turn(), on=k < count)
