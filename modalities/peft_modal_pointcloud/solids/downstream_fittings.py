"""Downstream families: screens, vessels and sanitary ware. None of them is pre-trained on.

Each function appends the primitives of all its instances at once: proportions are uniform draws, options are coin
flips that switch primitives off. Lengths are in arbitrary units, since every cloud is scaled to the unit sphere.
"""

from __future__ import annotations

import math

import torch

from peft_modal_pointcloud.solids.assembly import (
    ALONG_X,
    ARCH,
    UPSIDE_DOWN,
    Assembly,
    turn_about,
)


def display(make: Assembly) -> None:
    """A flat screen on a foot, a television on two feet, a tube monitor, or two screens on one stand."""
    width, style, lean = make.uniform(0.55, 1.2), make.integer(0, 3), make.uniform(-0.05, 0.3)
    height = width * make.uniform(0.5, 0.68)
    tube, twin, feet = style == 3, style == 2, style == 1
    width = torch.where(twin, width * 0.75, width)
    lift = torch.where(feet, make.uniform(0.04, 0.1), make.uniform(0.12, 0.32))
    lift = torch.where(tube, 0.12, lift)
    thick = torch.where(tube, 0.14, make.uniform(0.025, 0.06))
    lean = torch.where(feet | twin, 0.0, lean)
    middle = lift + height / 2
    turn = turn_about("x", -lean)
    angle = make.uniform(0.0, 0.35)
    for x in (-1, 1):
        shown = twin if x == 1 else torch.ones(make.count, dtype=torch.bool)
        across = torch.where(twin, x * width * 0.5 * angle.cos(), 0.0)
        yaw = torch.where(twin, -x * angle, 0.0)
        forward = torch.where(twin, 0.5 * width * angle.sin(), 0.0)
        make.box((width * 0.98, height, thick), (across, middle, forward), turn=turn_about("y", yaw) @ turn, on=shown)
    bulge, deep = make.uniform(0.04, 0.08), make.uniform(0.3, 0.5)
    housing = (width * 0.55, height * 0.6, torch.where(tube, deep, bulge))
    behind = (0.0, middle, -thick / 2 - torch.where(tube, deep, bulge) / 2)
    make.box(housing, behind, turn=turn, on=tube | (~twin & make.chance(0.6)))
    make.frustum(
        height * 0.46,
        height * 0.3,
        deep * 0.6,
        (0.0, middle, -deep * 0.35),
        turn=turn_about("x", -math.pi / 2),
        on=tube,
    )
    neck = make.uniform(0.03, 0.09)
    make.board((0.0, 0.0, -0.08), (0.0, middle, -0.04), neck, 0.03, on=~feet & ~tube)
    base, is_round = make.uniform(0.14, 0.22), make.chance(0.4)
    make.frustum(base, base * 0.9, 0.025, (0.0, 0.012, -0.05), on=~feet & is_round)
    make.box((base * 2.2, 0.025, base * 1.4), (0.0, 0.012, -0.05), on=~feet & ~is_round)
    for x in (-1, 1):
        for z in (-0.14, 0.14):
            make.rod((x * width * 0.36, 0.0, z), (x * width * 0.33, lift * 1.2, 0.0), 0.012, on=feet)
    make.box((width * 0.7, 0.06, 0.08), (0.0, 0.03, 0.14), on=feet & make.chance(0.4))


def waste_bin(make: Assembly) -> None:
    """An open bucket or box, with a rim, or closed by a dome, a flat lid or an open one; wheels, pedal, handles."""
    height, bottom, flare = make.uniform(0.5, 1.1), make.uniform(0.2, 0.36), make.uniform(1.0, 1.4)
    is_box, lid = make.chance(0.35), make.integer(0, 3)
    top = bottom * torch.where(is_box, 1.0, flare)
    depth = make.uniform(0.7, 1.1)
    make.frustum(bottom, top, height, (0.0, height / 2, 0.0), caps="bottom", on=~is_box)
    make.box((2 * bottom, height, 2 * bottom * depth), (0.0, height / 2, 0.0), is_open=1.0, on=is_box)
    make.torus(top, make.uniform(0.012, 0.03), (0.0, height, 0.0), on=~is_box & make.chance(0.7))
    brim = make.uniform(0.03, 0.06)
    for z in (-1, 1):
        size = (2 * bottom + brim, brim, brim)
        make.box(size, (0.0, height, z * bottom * depth), on=is_box & (lid == 0))
    dome = top * make.uniform(0.35, 0.8)
    make.ellipsoid((top, dome, top), (0.0, height, 0.0), lowest=0.0, on=(lid == 1) & ~is_box)
    make.frustum(top * 1.06, top * 0.9, 0.06, (0.0, height, 0.0), on=(lid == 2) & ~is_box)
    swing = make.uniform(0.9, 1.9)
    tilt = torch.where(lid == 3, swing, make.uniform(0.0, 0.12))
    deep = 2 * bottom * depth
    cover = (0.0, height + 0.02 + deep / 2 * tilt.sin(), -deep / 2 + deep / 2 * tilt.cos())
    make.box((2 * bottom + 0.04, 0.04, deep), cover, turn=turn_about("x", -tilt), on=is_box & (lid > 0))
    flap = (0.0, height + top * tilt.sin(), -top + top * tilt.cos())
    make.frustum(top, top, 0.03, flap, turn=turn_about("x", -tilt), on=(lid == 3) & ~is_box)
    wheeled = is_box & (height > 0.7)
    for x in (-1, 1):
        make.frustum(0.08, 0.08, 0.05, (x * bottom, 0.06, -deep / 2), turn=ALONG_X, on=wheeled)
    make.rod(
        (-bottom * 0.8, height * 0.95, -deep / 2 - 0.06),
        (bottom * 0.8, height * 0.95, -deep / 2 - 0.06),
        0.018,
        on=wheeled,
    )
    pedal = ~wheeled & (lid > 0) & make.chance(0.5)
    make.box((0.12, 0.02, 0.14), (0.0, 0.03, bottom * torch.where(is_box, depth, 1.0) + 0.05), on=pedal)


def bag(make: Assembly) -> None:
    """Shopping bag, handbag, rucksack or holdall: the body, one or two handles, shoulder straps, flap, pockets."""
    style = make.integer(0, 3)
    tote, hand, pack, hold = (style == k for k in range(4))
    width, height, depth = make.uniform(0.5, 0.8), make.uniform(0.45, 0.8), make.uniform(0.16, 0.32)
    make.box((width, height, depth), (0.0, height / 2, 0.0), is_open=1.0, on=tote)
    low = height * 0.75
    make.ellipsoid((width / 2, low / 2, depth * 0.6), (0.0, low / 2, 0.0), on=hand)
    make.box((width * 0.85, low * 0.6, depth), (0.0, low * 0.32, 0.0), on=hand & make.chance(0.6))
    tall = height * 1.1
    make.box((width * 0.75, tall * 0.75, depth), (0.0, tall * 0.375, 0.0), on=pack)
    make.frustum(depth / 2, depth / 2, width * 0.75, (0.0, tall * 0.75, 0.0), turn=ALONG_X, on=pack)
    pocket = tall * make.uniform(0.3, 0.45)
    make.box((width * 0.55, pocket, 0.12), (0.0, pocket * 0.6, depth / 2 + 0.06), on=pack & make.chance(0.8))
    body, length = make.uniform(0.18, 0.28), make.uniform(0.8, 1.2)
    make.frustum(body, body, length, (0.0, body, 0.0), turn=ALONG_X, on=hold)
    tube, reach, rise = make.uniform(0.012, 0.025), width * make.uniform(0.22, 0.34), make.uniform(0.14, 0.34)
    base = torch.where(tote, height, torch.where(hand, low * 0.85, torch.where(pack, tall * 0.8, 1.7 * body)))
    apart = torch.where(tote, depth / 2, torch.where(hold, body * 0.7, 0.0))
    rise = torch.where(pack, 0.12, rise)
    reach = torch.where(pack, 0.1, torch.where(hand, reach * 1.2, reach))
    for z in (-1, 1):
        shown = tote | hold if z == 1 else torch.ones(make.count, dtype=torch.bool)
        make.torus(rise, tube, (0.0, base, z * apart), arc=math.pi, stretch=reach / rise, turn=ARCH, on=shown)
    strap_turn = turn_about("y", math.pi / 2) @ turn_about("x", math.pi / 2)
    for x in (-1, 1):
        at = (x * width * 0.22, tall * 0.42, -depth / 2)
        make.torus(0.13, 0.025, at, arc=math.pi, stretch=tall * 0.33 / 0.13, turn=strap_turn, on=pack)
    flap = make.uniform(0.25, 0.6)
    make.box((width * 0.8, low * flap, 0.03), (0.0, low * (0.8 - flap / 2), depth * 0.55), on=hand & make.chance(0.4))
    make.torus(0.75 * length * 0.5, tube, (0.0, 1.5 * body, 0.0), arc=math.pi, turn=ARCH, on=hold & make.chance(0.3))


def sink(make: Assembly) -> None:
    """A round or square basin, free with a rim or let into a counter, on a pedestal, a cabinet or the wall; tap."""
    width, depth, deep = make.uniform(0.22, 0.32), make.uniform(0.17, 0.26), make.uniform(0.12, 0.22)
    is_square, mount = make.chance(0.45), make.integer(0, 2)
    top = make.uniform(0.75, 0.9)
    is_counter, is_pedestal = mount == 1, mount == 0
    make.ellipsoid((width, deep, depth), (0.0, top, 0.0), lowest=0.0, turn=UPSIDE_DOWN, on=~is_square)
    twin = is_square & is_counter & make.chance(0.4)
    shift = torch.where(twin, width * 1.1, 0.0)
    size = (2 * width, deep, 2 * depth)
    make.box(size, (-shift, top - deep / 2, 0.0), is_open=1.0, on=is_square)
    make.box(size, (shift, top - deep / 2, 0.0), is_open=1.0, on=twin)
    make.torus(width, 0.022, (0.0, top, 0.0), stretch=depth / width, on=~is_square & ~is_counter)
    # The counter is a frame of four boards around the basin, so that the basin stays open.
    hole, board, margin = shift + width, 0.05, make.uniform(0.1, 0.45)
    back = make.uniform(0.1, 0.16)
    margin = torch.where(is_counter, margin, 0.05)
    for x in (-1, 1):
        at = (x * (hole + margin / 2), top, -back / 2)
        make.box((margin, board, 2 * depth + back), at, on=is_counter | is_square)
    length = 2 * (hole + margin)
    make.box((length, board, back), (0.0, top, -depth - back / 2))
    make.box((length, board, 0.06), (0.0, top, depth + 0.03), on=is_counter | is_square)
    pole, tap_z, spout = make.uniform(0.1, 0.26), -depth - back * 0.5, make.uniform(0.06, 0.1)
    make.rod((0.0, top, tap_z), (0.0, top + pole, tap_z), 0.018)
    turn = turn_about("y", -math.pi / 2) @ ARCH
    make.torus(spout, 0.016, (0.0, top + pole, tap_z + spout), arc=math.pi, turn=turn)
    handles = make.chance(0.6)
    make.rod((-0.11, top + 0.06, tap_z), (0.11, top + 0.06, tap_z), 0.022, on=handles)
    column = make.uniform(0.08, 0.12)
    make.frustum(
        column * make.uniform(1.1, 1.6),
        column,
        top - deep * 0.7,
        (0.0, (top - deep * 0.7) / 2, -depth * 0.2),
        on=is_pedestal,
    )
    low = torch.where(make.chance(0.5), 0.0, 0.3)
    tall = top - deep - low
    cupboard = (length * 0.96, tall, 2 * depth + back)
    make.box(cupboard, (0.0, low + tall / 2, -back / 2), on=is_counter & make.chance(0.75))


def toilet(make: Assembly) -> None:
    """A long open bowl with a seat ring, the lid up or down, on a foot or on the wall, with or without a cistern."""
    width, length, height = make.uniform(0.17, 0.21), make.uniform(1.2, 1.5), make.uniform(0.38, 0.45)
    deep = make.uniform(0.22, 0.32)
    stretch = length
    make.ellipsoid((width, deep, width * stretch), (0.0, height, 0.0), lowest=0.0, turn=UPSIDE_DOWN)
    make.torus(width * 0.92, 0.03, (0.0, height, 0.0), stretch=stretch)
    hinge, is_up = -width * stretch, make.chance(0.5)
    tilt = torch.where(is_up, make.uniform(1.5, 1.8), 0.0)
    reach = width * stretch
    at = (0.0, height + 0.04 + reach * tilt.sin(), hinge + reach * tilt.cos())
    make.ellipsoid((width, 0.025, reach), at, turn=turn_about("x", -tilt), on=is_up | make.chance(0.7))
    hung = make.chance(0.25)
    foot, waist = make.uniform(0.11, 0.16), make.uniform(0.08, 0.12)
    low = height - deep * 0.6
    make.frustum(foot, waist, low, (0.0, low / 2, -width * 0.4), on=~hung)
    make.box((foot * 1.7, low, width * stretch), (0.0, low / 2, -width * 0.6), on=~hung & make.chance(0.6))
    cistern, tank = ~hung | make.chance(0.3), make.uniform(0.3, 0.42)
    tank_width, thick = make.uniform(0.36, 0.46), make.uniform(0.15, 0.2)
    high = cistern & make.chance(0.1)
    base = height + torch.where(high, 0.8, 0.0)
    back = hinge - thick / 2 - 0.04
    make.box((tank_width, tank, thick), (0.0, base + tank / 2, back), on=cistern)
    make.box((tank_width * 1.06, 0.035, thick * 1.12), (0.0, base + tank, back), on=cistern)
    make.rod((0.0, height, back), (0.0, base, back), 0.025, on=high)
    make.frustum(0.03, 0.03, 0.03, (0.0, base + tank + 0.03, back), on=cistern & make.chance(0.6))
    shelf = thick + 0.12
    make.box((width * 1.5, 0.09, shelf), (0.0, height - 0.04, hinge - shelf / 2 + 0.1))
    make.box((0.5, make.uniform(0.7, 1.0), 0.03), (0.0, 0.45, hinge - 0.07), on=hung & ~cistern)
    make.rod(
        (tank_width / 2, base + tank * 0.8, back),
        (tank_width / 2 + 0.06, base + tank * 0.7, back + 0.1),
        0.012,
        on=cistern & make.chance(0.4),
    )
