"""Profiles of a microscope and of a person's scalp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProfile:
    """Optical properties of one microscope at one site."""

    site: str = "0013"
    serial: str = "A2LEBJJDE00060O"
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # color cast: R, G, B relative to neutral
    exposure: float = 0.55  # target mean of auto-exposure, 0..1
    vignette: float = 0.35  # loss of light in the corners, 0..1
    light_angle: float = 0.8  # direction of shadows, radians
    lighting: float = 1.0  # spread of light, glare and exposure between images
    blur: float = 0.8  # sigma of the lens, pixels
    noise: float = 0.008  # standard deviation of the sensor noise, 0..1
    quality: int = 82  # JPEG
    magnification: float = 1.0


@dataclass(frozen=True)
class Scalp:
    """Skin and hair of one person's scalp, without its flaking."""

    skin: tuple[float, float, float] = (0.70, 0.54, 0.46)
    redness: float = 0.4  # 0..1
    sebum: float = 0.4  # 0..1
    hairs: float = 20.0  # mean number of hairs in the frame
    hair_width: float = 8.5  # pixels
    hair_shade: float = 0.13  # 0 black .. 1 white
    hair_tint: tuple[float, float, float] = (1.0, 0.86, 0.76)


@dataclass(frozen=True)
class OtherSeverities:
    """Severities of the symptoms in addition to micro-keratin, in grade units: 0 good to 3 severe."""

    excess_sebum: float = 0.0
    erythema_between_follicles: float = 0.0
    follicular_pustules: float = 0.0
    dandruff: float = 0.0
    hair_loss: float = 0.0
