"""Downstream families: furniture. None of them is pre-trained on.

Each function appends the primitives of all its instances at once: proportions are uniform draws, options are coin
flips that switch primitives off. Lengths are in arbitrary units, since every cloud is scaled to the unit sphere.
"""

from __future__ import annotations

import torch

from peft_modal_pointcloud.solids.assembly import (
    ALONG_Z,
    CORNERS,
    FULL_TURN,
    Assembly,
    turn_about,
)


def chair(make: Assembly) -> None:
    """Square or round seat on four legs or on a pole with a star foot; closed, barred or framed back; armrests."""
    width, depth, height = make.uniform(0.42, 0.58), make.uniform(0.4, 0.55), make.uniform(0.38, 0.52)
    slab, is_round, swivel = make.uniform(0.03, 0.1), make.chance(0.2), make.chance(0.3)
    make.box((width, slab, depth), (0.0, height, 0.0), on=~is_round)
    make.frustum(width / 2, width / 2, slab, (0.0, height, 0.0), on=is_round)
    inset = torch.where(is_round, 0.62, 0.9)
    splay, leg = make.uniform(0.0, 0.07), make.uniform(0.016, 0.035)
    hub, star = height * 0.12, make.uniform(0.24, 0.32)
    for x, z in CORNERS:
        top = (x * width / 2 * inset, height, z * depth / 2 * inset)
        foot = (
            torch.where(swivel, x * star * 0.72, top[0] + x * splay),
            torch.where(swivel, 0.02, 0.0),
            torch.where(swivel, z * star * 0.72, top[2] + z * splay),
        )
        start = (torch.where(swivel, 0.0, top[0]), torch.where(swivel, hub, height), torch.where(swivel, 0.0, top[2]))
        make.rod(start, foot, leg)
    make.rod((0.0, hub, 0.0), (0.0, height, 0.0), leg * 1.4, on=swivel)
    rise, lean = make.uniform(0.35, 0.65), make.uniform(0.0, 0.16)
    closed, bars = make.chance(0.45), make.chance(0.6)
    # A closed back starts just above the seat, else the same board is the top rail between two posts.
    low = torch.where(closed, make.uniform(0.03, 0.15), rise - 0.12)
    at_z = -depth / 2 * torch.where(is_round, 0.85, 0.97)
    make.board((0.0, height + low, at_z - lean * low / rise), (0.0, height + rise, at_z - lean), width * 0.95, 0.03)
    for x in (-1, 1):
        across = x * width * torch.where(closed | bars, 0.4, 0.14)
        make.rod((across, height, at_z), (across, height + rise * 0.95, at_z - lean * 0.95), leg)
    arms, arm, rest = make.chance(0.4), make.uniform(0.17, 0.25), make.uniform(0.5, 0.95)
    for x in (-1, 1):
        across, reach = x * (width / 2 + 0.015), depth * rest
        make.box((0.05, 0.03, reach), (across, height + arm, at_z + reach / 2), on=arms)
        front = at_z + reach * 0.9
        make.rod((across, height, front), (across, height + arm, front), leg, on=arms)


def stool(make: Assembly) -> None:
    """A round or square seat without a back on three or four legs or a foot plate; ring or bars for the feet."""
    radius, height, slab = make.uniform(0.15, 0.24), make.uniform(0.32, 0.85), make.uniform(0.03, 0.09)
    is_square, pedestal = make.chance(0.3), make.chance(0.25)
    make.frustum(radius, radius, slab, (0.0, height, 0.0), on=~is_square)
    make.box((1.8 * radius, slab, 1.8 * radius), (0.0, height, 0.0), on=is_square)
    puff = radius * make.uniform(0.25, 0.5)
    make.ellipsoid((radius, puff, radius), (0.0, height + slab / 2, 0.0), lowest=0.0, on=~is_square & make.chance(0.3))
    count = torch.where(is_square, 4, make.integer(3, 4))
    splay, leg = make.uniform(1.0, 1.6), make.uniform(0.014, 0.03)
    for k in range(4):
        angle = (k + 0.5) * FULL_TURN / count
        x, z = angle.cos() * radius, angle.sin() * radius
        foot, top = (x * splay, 0.0, z * splay), (x * 0.8, height, z * 0.8)
        make.rod(foot, top, leg, on=~pedestal & (k < count))
    share = make.uniform(0.25, 0.45)
    around = radius * (splay + (0.8 - splay) * share)
    make.torus(around, 0.013, (0.0, height * share, 0.0), on=(pedestal | ~is_square) & make.chance(0.65))
    make.rod((0.0, 0.0, 0.0), (0.0, height, 0.0), make.uniform(0.02, 0.045), on=pedestal)
    plate = radius * make.uniform(0.95, 1.3)
    make.frustum(plate, plate * make.uniform(0.3, 1.0), 0.05, (0.0, 0.025, 0.0), on=pedestal)
    bars = ~pedestal & is_square & make.chance(0.7)
    reach = around * 0.71
    for side in (-1, 1):
        start, end = (-reach, height * share, -side * reach), (reach, height * share, side * reach)
        make.rod(start, end, 0.012, on=bars)


def sofa(make: Assembly) -> None:
    """One to three seats between box or rolled arms, a leaning back, cushions, short feet; some with a corner seat."""
    seats, seat, depth = make.integer(1, 3), make.uniform(0.5, 0.65), make.uniform(0.7, 0.95)
    low, base, arm = make.uniform(0.04, 0.16), make.uniform(0.16, 0.28), make.uniform(0.1, 0.22)
    inner = seats * seat
    width = inner + 2 * arm
    top = low + base
    make.box((width, base, depth), (0.0, low + base / 2, 0.0))
    rise, lean, thick = make.uniform(0.38, 0.6), make.uniform(0.0, 0.16), make.uniform(0.14, 0.24)
    back_z = -depth / 2 + thick / 2
    make.board((0.0, top, back_z), (0.0, top + rise, back_z - lean), width * 0.98, thick)
    tall, armless, rolled = make.uniform(0.18, 0.32), make.chance(0.12), make.chance(0.4)
    for x in (-1, 1):
        across = x * (width - arm) / 2
        make.box((arm, tall, depth), (across, top + tall / 2, 0.0), on=~armless)
        roll = (across, top + tall, 0.0)
        make.frustum(arm * 0.62, arm * 0.62, depth, roll, turn=ALONG_Z, on=rolled & ~armless)
    soft, plump = make.uniform(0.1, 0.18), make.chance(0.35)
    for k in range(3):
        across = (k + 0.5) * seat - inner / 2
        size = (seat * 0.97, torch.where(plump, 0.07, soft), (depth - thick) * 0.97)
        make.box(size, (across, top + soft / 2, thick / 2), on=k < seats)
    leg = make.uniform(0.02, 0.045)
    for x, z in CORNERS:
        foot = (x * width * 0.46, 0.0, z * depth * 0.43)
        make.rod(foot, (foot[0], low, foot[2]), leg * 0.7, end_radius=leg)
    side = torch.where(make.chance(0.5), 1.0, -1.0)
    reach = make.uniform(0.5, 0.8)
    corner = (side * (inner - seat) / 2, (top + soft) / 2, depth / 2 + reach / 2)
    make.box((seat, top + soft, reach), corner, on=(seats == 3) & make.chance(0.4))


def desk(make: Assembly) -> None:
    """A top on drawer blocks, slab sides or legs, mostly with a modesty panel; some with a hutch or a side wing."""
    width, depth, height = make.uniform(1.1, 1.8), make.uniform(0.55, 0.8), make.uniform(0.7, 0.78)
    slab = make.uniform(0.025, 0.05)
    make.box((width, slab, depth), (0.0, height, 0.0))
    style = make.integer(0, 3)
    block, drawer_height = make.uniform(0.32, 0.45), height * make.uniform(0.6, 0.95)
    side = torch.where(make.chance(0.5), 1, -1)
    for x in (-1, 1):
        has_block = (style == 0) | ((style != 3) & (side == x))
        across = x * (width / 2 - block / 2 - 0.03)
        make.box((block, drawer_height, depth * 0.92), (across, height - drawer_height / 2, 0.0), on=has_block)
        # A slab side takes the slot of the front leg.
        plain = (style == 3) | ((style == 1) & (side != x))
        for z in (-1, 1):
            thick, deep = torch.where(plain, 0.04, 0.05), torch.where(plain, depth * 0.95, 0.05)
            foot = (x * (width / 2 - 0.05), height / 2, torch.where(plain, 0.0, z * (depth / 2 - 0.05)))
            make.box((thick, height, deep), foot, on=True if z == 1 else ~plain)
    panel = height * make.uniform(0.35, 0.9)
    make.box((width * 0.92, panel, 0.025), (0.0, height - panel / 2, -depth * 0.42), on=make.chance(0.7))
    hutch, rise, shelf = make.chance(0.3), make.uniform(0.3, 0.55), make.uniform(0.2, 0.3)
    back_z = -depth / 2 + shelf / 2
    for x in (-1, 1):
        make.box((0.03, rise, shelf), (x * width * 0.48, height + rise / 2, back_z), on=hutch)
    make.box((width * 0.98, 0.03, shelf), (0.0, height + rise, back_z), on=hutch)
    wing, has_wing = make.uniform(0.4, 0.7), make.chance(0.25)
    across = -side * (width / 2 - 0.22)
    make.box((0.44, slab, wing), (across, height, depth / 2 + wing / 2), on=has_wing)
    make.box((0.4, height, 0.04), (across, height / 2, depth / 2 + wing - 0.04), on=has_wing)


def shelf(make: Assembly) -> None:
    """Three to six boards between closed sides or on four posts; back, middle wall and a few things on it."""
    width, height, depth = make.uniform(0.6, 1.3), make.uniform(0.9, 2.0), make.uniform(0.24, 0.42)
    count, slab, posts = make.integer(3, 6), make.uniform(0.02, 0.045), make.chance(0.35)
    thick = torch.where(posts, 0.04, slab)
    for x in (-1, 1):
        for z in (-1, 1):
            # With closed sides the two slots at the front are off and those at the back span the whole depth.
            deep = torch.where(posts, 0.04, depth)
            at = (x * (width - thick) / 2, height / 2, torch.where(posts, z * (depth - 0.04) / 2, 0.0))
            make.box((thick, height, deep), at, on=posts if z == 1 else True)
    low = make.uniform(0.03, 0.16) / height
    top = torch.where(make.chance(0.6), 1.0, 0.94)
    for k in range(6):
        y = height * (low + (top - low) * k / (count - 1))
        make.box((width, slab, depth), (0.0, y, 0.0), on=k < count)
    make.box((width, height, 0.015), (0.0, height / 2, -depth / 2), on=~posts & make.chance(0.45))
    make.box((slab, height * 0.96, depth * 0.98), (0.0, height / 2, 0.0), on=~posts & (width > 0.8) & make.chance(0.5))
    gap = height * (top - low) / (count - 1)
    for level, side in ((1, 1), (0, -1)):
        wide, tall, deep = make.uniform(0.12, 0.34), gap * make.uniform(0.4, 0.85), make.uniform(0.4, 0.8)
        stand = (side * width * make.uniform(0.1, 0.3), height * low + level * gap + tall / 2, 0.0)
        make.box((width * wide, tall, depth * deep), stand, on=make.chance(0.5))


def pedestal_table(make: Assembly) -> None:
    """A round, square or long top on one or two columns; foot plate, dome, three or four feet, or a cross."""
    radius, height, slab = make.uniform(0.3, 0.65), make.uniform(0.55, 1.05), make.uniform(0.02, 0.06)
    shape, column = make.integer(0, 2), make.uniform(0.03, 0.08)
    twin = shape == 2
    make.frustum(radius, radius, slab, (0.0, height, 0.0), on=shape == 0)
    length = torch.where(twin, 2.2, 1.0) * 1.8 * radius
    make.box((length, slab, 1.8 * radius), (0.0, height, 0.0), on=shape > 0)
    foot = make.integer(0, 2)
    spread, swell = radius * make.uniform(0.55, 0.8), make.chance(0.35)
    for x in (-1, 1):
        shown = twin if x == 1 else torch.ones(make.count, dtype=torch.bool)
        across = torch.where(twin, x * length * 0.3, 0.0)
        make.rod(
            (across, 0.0, 0.0), (across, height, 0.0), column * make.uniform(1.0, 1.5), end_radius=column, on=shown
        )
        plate = (across, 0.02, 0.0)
        make.frustum(
            spread, spread * make.uniform(0.4, 1.0), 0.05, plate, on=shown & ((foot == 0) | (twin & (foot == 1)))
        )
        make.box((0.07, 0.05, 2 * spread), plate, on=shown & twin & (foot == 2))
    bulge = column * make.uniform(1.5, 2.2)
    make.ellipsoid((bulge, height * 0.2, bulge), (0.0, height * 0.4, 0.0), on=swell & ~twin)
    make.ellipsoid((spread, spread * 0.5, spread), (0.0, 0.0, 0.0), lowest=0.0, on=(foot == 1) & ~twin)
    count, rise = make.integer(3, 4), height * make.uniform(0.08, 0.4)
    for k in range(4):
        angle = k * FULL_TURN / count
        end = (angle.cos() * spread, 0.02, angle.sin() * spread)
        make.rod((0.0, rise, 0.0), end, 0.03, on=(foot == 2) & ~twin & (k < count))


def cabinet(make: Assembly) -> None:
    """A closed body with raised doors or drawers, knobs, feet or a plinth; tall, low or a chest; a door may be ajar."""
    style = make.integer(0, 2)
    tall, broad = style == 0, style == 1
    height = torch.where(
        tall, make.uniform(1.5, 2.1), torch.where(broad, make.uniform(0.6, 0.85), make.uniform(0.8, 1.2))
    )
    width = torch.where(
        tall, make.uniform(0.7, 1.2), torch.where(broad, make.uniform(1.2, 1.8), make.uniform(0.5, 0.9))
    )
    depth, low = make.uniform(0.38, 0.6), make.uniform(0.05, 0.2)
    plinth = make.chance(0.4)
    low = torch.where(plinth, 0.07, low)
    middle, front = low + height / 2, depth / 2
    make.box((width, height, depth), (0.0, middle, 0.0))
    make.box((width * 1.05, 0.04, depth * 1.07), (0.0, low + height, 0.0), on=make.chance(0.6))
    drawers = ~tall & make.chance(0.5)
    columns, rows = torch.where(drawers, 1, 2), torch.where(drawers, 4, make.integer(1, 2))
    columns = torch.where(broad & ~drawers & (rows == 1), 4, columns)
    ajar = make.chance(0.3) & ~drawers
    swing = make.uniform(0.5, 1.6)
    wide, high = width / columns, height / rows
    for k in range(4):
        shown = k < columns * rows
        column, row = k % columns, torch.div(torch.tensor(k), columns, rounding_mode="floor")
        x, y = (column + 0.5) * wide - width / 2, low + (row + 0.5) * high
        # The first door hangs on its left edge and may stand open.
        angle = torch.where(ajar, swing, 0.0) if k == 0 else torch.zeros(make.count)
        hinge, half = x - wide * 0.47, wide * 0.47
        at = (hinge + half * angle.cos(), y, front + 0.015 + half * angle.sin())
        make.box((wide * 0.94, high * 0.95, 0.025), at, turn=turn_about("y", -angle), on=shown)
        grip = torch.where(drawers, 0.0, torch.where(column % 2 == 0, 0.36, -0.36)) * wide
        along = half + grip
        knob = (hinge + along * angle.cos(), y, front + 0.05 + along * angle.sin())
        grip_size = torch.where(drawers, wide * 0.12, 0.022)
        make.ellipsoid((grip_size, torch.where(drawers, 0.02, 0.05), 0.025), knob, on=shown)
    leg = make.uniform(0.02, 0.04)
    for k, (i, j) in enumerate(CORNERS):
        base = plinth & (k == 0)
        foot = (torch.where(base, 0.0, i * width * 0.45), low / 2, torch.where(base, -0.02, j * depth * 0.42))
        size = (torch.where(base, width * 0.95, 2 * leg), low, torch.where(base, depth * 0.9, 2 * leg))
        make.box(size, foot, on=base | ~plinth)
