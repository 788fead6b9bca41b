"""Pre-training families that are built: furniture, stairs, fences and the like.

Each function appends the primitives of all its instances at once: proportions are uniform draws, options are coin
flips that switch primitives off. Lengths are in arbitrary units, since every cloud is scaled to the unit sphere.
"""

from __future__ import annotations

import math

import torch

from peft_modal_pointcloud.solids.assembly import (
    ARCH,
    CORNERS,
    Assembly,
    turn_about,
)


def table(make: Assembly) -> None:
    """Four legs under a rectangular or round top; square or round, tapered, splayed legs; apron, lower shelf."""
    width, depth, height = make.uniform(0.9, 1.9), make.uniform(0.6, 1.1), make.uniform(0.4, 0.85)
    slab, splay, leg = make.uniform(0.03, 0.08), make.uniform(0.0, 0.12), make.uniform(0.025, 0.06)
    is_round, is_square_leg = make.chance(0.3), make.chance(0.5)
    depth = torch.where(is_round, width, depth)
    inset = torch.where(is_round, 0.62, make.uniform(0.8, 0.95))
    make.box((width, slab, depth), (0.0, height + slab / 2, 0.0), on=~is_round)
    make.frustum(width / 2, width / 2, slab, (0.0, height + slab / 2, 0.0), on=is_round)
    taper = make.uniform(0.5, 1.0)
    for x, z in CORNERS:
        top = (x * width / 2 * inset, height, z * depth / 2 * inset)
        foot = (top[0] + x * splay, 0.0, top[2] + z * splay)
        make.board(foot, top, 2 * leg, 2 * leg, on=is_square_leg)
        make.rod(foot, top, leg * taper, end_radius=leg, on=~is_square_leg)
    apron = make.uniform(0.06, 0.14)
    apron_size = (width * inset * 0.98, apron, depth * inset * 0.98)
    make.box(apron_size, (0.0, height - apron / 2, 0.0), on=make.chance(0.4) & ~is_round)
    shelf_size = (width * inset, 0.03, depth * inset)
    make.box(shelf_size, (0.0, height * make.uniform(0.2, 0.45), 0.0), on=make.chance(0.3) & ~is_round)


def lamp(make: Assembly) -> None:
    """A standing lamp with a straight pole, or a desk lamp with a jointed arm; open shade, bulb."""
    jointed, height = make.chance(0.4), make.uniform(0.7, 1.8)
    base, pole = make.uniform(0.18, 0.34), make.uniform(0.015, 0.045)
    base_kind = make.integer(0, 2)
    make.frustum(base, base * make.uniform(0.5, 1.0), 0.06, (0.0, 0.03, 0.0), on=base_kind == 0)
    make.ellipsoid((base, base * 0.5, base), (0.0, 0.0, 0.0), lowest=0.0, on=base_kind == 1)
    make.box((base * 1.7, 0.06, base * 1.7), (0.0, 0.03, 0.0), on=base_kind == 2)
    make.rod((0.0, 0.0, 0.0), (0.0, height, 0.0), pole, on=~jointed)
    # Vases below the shade are common on table lamps.
    vase = make.uniform(0.1, 0.22)
    make.ellipsoid((vase, height * 0.28, vase), (0.0, height * 0.3, 0.0), on=~jointed & make.chance(0.35))
    rim, neck, deep = make.uniform(0.28, 0.5), make.uniform(0.08, 0.26), make.uniform(0.25, 0.5)
    make.frustum(rim, neck, deep, (0.0, height, 0.0), caps="none", on=~jointed)
    elbow = (-make.uniform(0.2, 0.45), make.uniform(0.45, 0.75), 0.0)
    head = (make.uniform(0.15, 0.5), make.uniform(0.75, 1.15), 0.0)
    make.rod((0.0, 0.0, 0.0), elbow, pole, on=jointed)
    make.rod(elbow, head, pole, on=jointed)
    make.ellipsoid((0.05, 0.05, 0.05), elbow, on=jointed)
    tilt, shade = make.uniform(0.2, 1.0), make.uniform(0.2, 0.32)
    spot = (head[0] + shade / 2 * tilt.sin(), head[1] - shade / 2 * tilt.cos(), 0.0)
    make.frustum(rim * 0.6, neck * 0.5, shade, spot, turn=turn_about("z", tilt), caps="top", on=jointed)
    bulb = (torch.where(jointed, spot[0], 0.0), torch.where(jointed, spot[1], height), 0.0)
    make.ellipsoid((0.07, 0.09, 0.07), bulb, on=make.chance(0.5))


def bench(make: Assembly) -> None:
    """A long seat of one to three planks on slab sides or four legs, often with a two-plank back."""
    width, depth, height = make.uniform(1.3, 2.2), make.uniform(0.35, 0.55), make.uniform(0.35, 0.5)
    slab, planks = make.uniform(0.03, 0.07), make.integer(1, 3)
    plank = depth / planks * torch.where(planks > 1, 0.82, 1.0)
    for k in range(3):
        place = (k + 0.5) / planks * depth - depth / 2
        make.box((width, slab, plank), (0.0, height, place), on=k < planks)
    slabs, inset = make.chance(0.45), make.uniform(0.7, 0.95)
    for x in (-1, 1):
        make.box((make.uniform(0.05, 0.12), height, depth * 0.9), (x * width / 2 * inset, height / 2, 0.0), on=slabs)
    leg = make.uniform(0.025, 0.05)
    for x, z in CORNERS:
        foot = (x * width / 2 * inset, 0.0, z * depth * 0.42)
        make.board(foot, (foot[0], height, foot[2]), 2 * leg, 2 * leg, on=~slabs)
    back, rise, lean = make.chance(0.6), make.uniform(0.35, 0.55), make.uniform(0.02, 0.18)
    for x in (-1, 1):
        at = x * width / 2 * inset
        make.board((at, height, -depth / 2), (at, height + rise, -depth / 2 - lean), 0.05, 0.05, on=back)
    for share in (0.45, 0.88):
        y, behind = height + rise * share, -depth / 2 - lean * share + 0.03
        make.board((-width / 2, y, behind), (width / 2, y, behind), 0.13, 0.03, on=back)


def stairs(make: Assembly) -> None:
    """Four to ten steps in a straight flight, solid or open with stringers, or wound around a pole."""
    steps, run, rise = make.integer(4, 10), make.uniform(0.2, 0.32), make.uniform(0.14, 0.24)
    width, spiral, solid = make.uniform(0.6, 1.3), make.chance(0.25), make.chance(0.5)
    tread, twist = make.uniform(0.03, 0.07), make.uniform(0.35, 0.6)
    for k in range(10):
        high = (k + 1) * rise
        tall = torch.where(solid & ~spiral, high, tread)
        angle = k * twist
        x = torch.where(spiral, width * 0.55 * angle.cos(), k * run)
        z = torch.where(spiral, -width * 0.55 * angle.sin(), 0.0)
        turn = torch.where(spiral[:, None, None], turn_about("y", angle), torch.eye(3))
        size = (torch.where(spiral, width, run), tall, torch.where(spiral, run * 1.3, width))
        make.box(size, (x, high - tall / 2, z), turn=turn, on=k < steps)
    total = steps * rise
    railing = ~spiral & (~solid | make.chance(0.4))
    lift = torch.where(solid, 0.5, -0.06)
    for side in (-1, 1):
        start = (-run / 2, rise * 0.5 + lift, side * width / 2)
        end = ((steps - 0.5) * run, total + lift, side * width / 2)
        make.board(start, end, 0.1, 0.04, on=railing)
    # The pole of a winding flight takes the slot of a baluster.
    make.rod((0.0, 0.0, width / 2), (0.0, rise * 0.5 + 0.5, width / 2), 0.03, on=railing & solid)
    post = torch.where(spiral, total * 1.15, rise * 0.5 + 0.5)
    place = torch.where(spiral, 0.0, -width / 2)
    make.rod((0.0, 0.0, place), (0.0, post, place), torch.where(spiral, 0.07, 0.03), on=spiral | (railing & solid))


def ladder(make: Assembly) -> None:
    """Two rails with four to eight rungs, leaning, upright, or a step ladder with a second pair of legs."""
    height, width, lean = make.uniform(1.4, 2.2), make.uniform(0.4, 0.65), make.uniform(0.0, 0.6)
    rungs, rail, taper = make.integer(4, 8), make.uniform(0.025, 0.045), make.uniform(0.65, 1.0)
    folding, is_step = make.chance(0.35), make.chance(0.4)
    lean = torch.where(folding, lean.clamp(min=0.25), lean)
    for x in (-1, 1):
        top = (x * width / 2 * taper, height, -lean)
        make.board((x * width / 2, 0.0, 0.0), top, 2 * rail, 2 * rail)
        make.board((x * width / 2, 0.0, -2 * lean), top, 1.6 * rail, 1.6 * rail, on=folding)
    for k in range(8):
        share = (k + 0.7) / (rungs + 0.4)
        half = width / 2 * (1 + (taper - 1) * share)
        start, end = (-half, height * share, -lean * share), (half, height * share, -lean * share)
        size = torch.where(is_step, 2.6 * rail, 1.2 * rail)
        make.board(start, end, 1.2 * rail, size, on=k < rungs)
    make.box((width * taper * 1.05, 0.04, 0.2), (0.0, height, -lean), on=folding & make.chance(0.6))
    make.rod(
        (-width / 2, height * 0.35, -1.65 * lean), (width / 2, height * 0.35, -1.65 * lean), rail * 0.7, on=folding
    )


def bed(make: Assembly) -> None:
    """Mattress on a frame, headboard, footboard, posts, pillows, blanket; some are bunks or have a canopy."""
    length, width = make.uniform(1.9, 2.2), make.uniform(0.85, 1.8)
    low, thick, frame = make.uniform(0.12, 0.35), make.uniform(0.14, 0.28), make.uniform(0.06, 0.2)
    surface = low + frame + thick
    make.box((width, frame, length), (0.0, low + frame / 2, 0.0))
    make.box((width * 0.96, thick, length * 0.97), (0.0, low + frame + thick / 2, 0.0))
    second = make.chance(0.25)
    bunk = second & make.chance(0.5)
    rise = make.uniform(0.85, 1.1)
    head = surface + make.uniform(0.2, 0.6)
    make.box((width * 1.04, head - low, 0.06), (0.0, (head + low) / 2, -length / 2), on=make.chance(0.75))
    foot = surface + make.uniform(-0.1, 0.2)
    make.box((width * 1.04, foot - low, 0.06), (0.0, (foot + low) / 2, length / 2), on=make.chance(0.4))
    post = make.uniform(0.03, 0.06)
    tall = torch.where(second, surface + rise + 0.1, torch.where(make.chance(0.2), head, low))
    for x, z in CORNERS:
        at = (x * (width / 2 - post), 0.0, z * (length / 2 - post))
        make.rod(at, (at[0], tall, at[2]), post)
    two, pillow = (width > 1.2) & make.chance(0.85), make.uniform(0.22, 0.32)
    for x, on in ((-1, make.chance(0.85)), (1, two)):
        across = torch.where(two, x * width * 0.24, 0.0)
        make.ellipsoid((pillow * 1.2, 0.09, pillow * 0.7), (across, surface + 0.05, -length * 0.37), on=on)
    cover = length * make.uniform(0.3, 0.65)
    make.box(
        (width * 1.02, thick * 0.9, cover), (0.0, surface - thick * 0.4, length * 0.49 - cover / 2), on=make.chance(0.6)
    )
    make.box((width, torch.where(bunk, thick, 0.04), length), (0.0, surface + rise, 0.0), on=second)


def arch(make: Assembly) -> None:
    """Two pillars carrying a half ring or a lintel; plinths, capitals, keystone; some have a second bay."""
    half, height, thick = make.uniform(0.35, 0.75), make.uniform(0.5, 1.4), make.uniform(0.08, 0.2)
    is_round, curved, double = make.chance(0.45), make.chance(0.7), make.chance(0.25)
    for x in (-1, 1):
        make.box((2 * thick, height, 2 * thick), (x * half, height / 2, 0.0), on=~is_round)
        at = (x * half, height / 2, 0.0)
        make.frustum(thick, thick * make.uniform(0.75, 1.0), height, at, on=is_round)
    pointed = make.uniform(0.7, 1.15)
    make.torus(half * pointed, thick * 0.9, (0.0, height, 0.0), arc=math.pi, stretch=1 / pointed, turn=ARCH, on=curved)
    lintel = make.uniform(0.15, 0.35)
    over = make.uniform(0.0, 0.3)
    wide = torch.where(double, 4.0, 2.0) * half + 2 * thick + over
    shift = torch.where(double, half, 0.0)
    make.box((wide, lintel, 2.2 * thick), (shift, height + lintel / 2, 0.0), on=~curved)
    plinth, capital = make.chance(0.5), make.chance(0.4)
    for x in (-1, 1):
        make.box((3 * thick, 0.12, 3 * thick), (x * half, 0.06, 0.0), on=plinth)
        make.box((2.6 * thick, 0.08, 2.6 * thick), (x * half, height, 0.0), on=capital)
    key = (0.0, height + half * pointed, 0.0)
    make.box((1.2 * thick, 2.6 * thick, 2.4 * thick), key, on=curved & make.chance(0.35))
    make.box((2 * thick, height, 2 * thick), (3 * half, height / 2, 0.0), on=double)
    make.torus(
        half * pointed,
        thick * 0.9,
        (2 * half, height, 0.0),
        arc=math.pi,
        stretch=1 / pointed,
        turn=ARCH,
        on=curved & double,
    )


def fence(make: Assembly) -> None:
    """Five to ten pickets or posts on two or three rails, or a panel between posts."""
    count, gap, height = make.integer(5, 10), make.uniform(0.17, 0.3), make.uniform(0.6, 1.2)
    wide, is_round = gap * make.uniform(0.3, 0.75), make.chance(0.3)
    span, wave = (count - 1) * gap, make.uniform(-0.25, 0.25)
    panel = make.chance(0.15)
    for k in range(10):
        x = k * gap - span / 2
        tall = height * (1 + wave * (2 * x / span) ** 2)
        shown = (k < count) & (~panel | (k == 0) | (k == count - 1) | (k == count // 2))
        deep = torch.where(is_round, wide, 0.04)
        make.box((wide, tall, deep), (x, tall / 2, 0.0), on=shown)
    rails, thick = make.integer(2, 3), make.uniform(0.05, 0.1)
    for k in range(3):
        y = height * torch.where(rails == 2, (0.25, 0.7, 0.0)[k], (0.15, 0.48, 0.8)[k])
        make.box((span + gap, thick, 0.05), (0.0, y, -0.04), on=k < rails)
    make.box((span, height * 0.85, 0.03), (0.0, height * 0.5, 0.0), on=panel)
