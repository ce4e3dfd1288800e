"""Grow hairs on a scalp, and draw them with their shadows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from scalp_core.synthetic.profiles import DeviceProfile, Scalp
from scalp_core.synthetic.textures import HEIGHT, WIDTH, Array, cut, texture_bank

_MARGIN = 140  # hairs rooted outside the frame cross it too
# Positions of the outline along a hair, from root to tip; denser at the root, which is tapered.
_ALONG = np.array((0, 0.006, 0.014, 0.03, 0.07, 0.15, 0.25, 0.36, 0.48, 0.6, 0.73, 0.86, 1.0))


@dataclass(frozen=True)
class Hair:
    """Outline and shade of one hair."""

    line: Array  # float (13, 2) points x, y from root to tip
    width: Array  # float (13,) pixels
    shade: float


def grow_hairs(scalp: Scalp, scale: float, rng: np.random.Generator) -> tuple[Array, list[Hair]]:
    """Place follicles on a jittered grid, each with one to three hairs along the parting."""
    hairs_each = np.array([0.45, 0.42, 0.13])
    units = scalp.hairs / scale**2 / float(hairs_each @ np.array([1, 2, 3]))
    spacing = float(np.sqrt(WIDTH * HEIGHT / max(units, 0.5)))
    columns, rows = np.meshgrid(
        np.arange(-_MARGIN, WIDTH + _MARGIN, spacing), np.arange(-_MARGIN, HEIGHT + _MARGIN, spacing)
    )
    columns[::2] += spacing / 2
    follicles = np.stack([columns.ravel(), rows.ravel()], -1) + rng.uniform(0, spacing, 2)
    follicles += rng.normal(0, spacing * 0.24, follicles.shape)
    parting, spread, sweep = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.3), rng.normal(0, 0.25)
    hairs = []
    for root in follicles:
        lean = parting + rng.normal(0, spread) + (rng.normal(0, 0.9) if rng.random() < 0.08 else 0)
        for _ in range(rng.choice(3, p=hairs_each) + 1):
            start = root + rng.normal(0, 2.5 * scale, 2)
            hairs.append(_hair(start, lean + rng.normal(0, 0.11), sweep, scalp, scale, rng))
    return follicles, hairs


def _hair(
    root: Array, lean: float, sweep: float, scalp: Scalp, scale: float, rng: np.random.Generator
) -> Hair:
    fine = rng.random() < 0.1  # vellus hairs: short and thin
    length = scale * (rng.uniform(60, 200) if fine else rng.uniform(420, 1000))
    t = _ALONG
    bend = sweep + rng.normal(0, 0.2)
    angles = lean + bend * (t - 0.3) + 0.08 * np.sin(t * rng.uniform(3, 7) + rng.uniform(0, 6))
    steps = np.stack([np.cos(angles), np.sin(angles)], -1) * (length * np.diff(t, prepend=0))[:, None]
    line = root + np.cumsum(steps, 0)
    thick = scalp.hair_width * scale * (0.4 if fine else rng.normal(1, 0.14))
    taper = np.minimum(1, 0.3 + 1.2 * np.sqrt(t * length / thick / 3)) * (
        np.minimum(1, (1.04 - t) * 2) if fine or rng.random() < 0.6 else 1
    )
    gray = rng.random() < scalp.gray_share
    shade = rng.uniform(0.5, 0.72) if gray else scalp.hair_shade * rng.uniform(0.75, 1.3)
    return Hair(line, np.maximum(thick * taper, 1.2), shade)


def _ribbon(hair: Hair, low: float, high: float) -> list[tuple[float, float]]:
    """Outline of a hair between two shares of its half width, at twice the frame's size."""
    along = np.gradient(hair.line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], -1) / np.hypot(*along.T)[:, None]
    across *= hair.width[:, None]
    sides = np.concatenate([hair.line + across * low / 2, (hair.line + across * high / 2)[::-1]]) * 2
    return list(map(tuple, sides.tolist()))


def _draw_hairs(hairs: list[Hair], side: float) -> Image.Image:
    """Draw hairs as an RGB image of shade, gloss and mask; antialiased by drawing at twice the size."""
    image = Image.new("RGB", (WIDTH * 2, HEIGHT * 2), (40, 0, 0))
    draw = ImageDraw.Draw(image)
    for hair in hairs:
        if _outside(hair):
            continue
        edge, core = int(hair.shade * 150), int(hair.shade * 255)
        draw.polygon(_ribbon(hair, -1, 1), fill=(edge, 0, 255))
        draw.polygon(_ribbon(hair, -0.66, 0.66), fill=(core, 0, 255))
        draw.polygon(_ribbon(hair, side * 0.32 - 0.17, side * 0.32 + 0.17), fill=(core, 255, 255))
    return image.reduce(2)


def _outside(hair: Hair) -> bool:
    low, high = hair.line.min(0), hair.line.max(0)
    return bool(high[0] < -8 or high[1] < -8 or low[0] > WIDTH + 8 or low[1] > HEIGHT + 8)


def lay_hairs(
    planes: list[Array], hairs: list[Hair], scalp: Scalp, device: DeviceProfile, rng: np.random.Generator
) -> None:
    """Draw hairs with their shadows onto R, G, B planes; a few stand upright, out of focus."""
    near = int(rng.random() < 0.35) * int(rng.integers(1, 4))  # upright hairs, out of focus
    order = rng.permutation(len(hairs))
    for chosen, soft, drop in ((order[near:], 0.0, 5), (order[:near], 2.6, 14)):
        if len(chosen):
            image = _draw_hairs([hairs[i] for i in chosen], float(rng.choice((-1, 1))))
            if soft:
                image = image.filter(ImageFilter.BoxBlur(soft))
            _blend_hairs(planes, image, drop * device.magnification, scalp, device, rng)


def _blend_hairs(
    planes: list[Array],
    image: Image.Image,
    drop: float,
    scalp: Scalp,
    device: DeviceProfile,
    rng: np.random.Generator,
) -> None:
    shade, gloss, mask = (np.asarray(band, dtype=np.float32) / 255 for band in image.split())
    shadow = _soft_shadow(image.getchannel(2), drop, device.light_angle)
    patchy = np.clip(cut(texture_bank().mottle, rng) * 0.6 + 0.35, 0, 1.3)
    gloss *= patchy * np.float32(device.specular * rng.uniform(0.22, 0.5))
    for plane, tint in zip(planes, scalp.hair_tint, strict=True):
        plane *= 1 - np.float32(0.42) * shadow
        hair = shade * np.float32(tint) + gloss
        plane += mask * (hair - plane)


def _soft_shadow(mask: Image.Image, drop: float, angle: float) -> Array:
    """Shadow of an object `drop` pixels above the skin; float32 (480, 640), 0..1."""
    small = mask.reduce(4).filter(ImageFilter.GaussianBlur(max(0.7, drop / 6)))
    dx, dy = drop * np.cos(angle) / 4, drop * np.sin(angle) / 4
    moved = small.transform(
        small.size, Image.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy), Image.Resampling.BILINEAR
    )
    return np.asarray(moved.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32) / 255
