"""Plan a synthetic set before rendering: people, microscopes, grades and names of the images."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import NormalDist
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.settings import rename_old_keys
from scalp_core.synthetic.profiles import DeviceProfile, Scalp

DELIVERED_PARTS = ("Training", "Validation")
# Images of each grade in the paper's training folders.
PAPER_COUNTS = (534, 4435, 5486, 2284)
_POSITIONS = ("2_TH", "3_TH", "4_LH", "5_RH", "6_BH")
_PERSON_SHARE = 0.8  # share of the variance of severity; the rest is between positions on one head
_TRAINING_SHARE = 7 / 9
_FIRST_DAY = datetime(2020, 10, 13, tzinfo=UTC)
_DAYS = 48


LayoutName = Literal["delivered", "zipped", "zipped-cp949"]


class SynthOptions(BaseModel):
    """Options of a synthetic set. The same options give the same bytes for any number of processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _old_keys = model_validator(mode="before")(rename_old_keys)

    images: int = Field(1000, ge=1, le=1_000_000, description="number of images")
    seed: int = Field(0, ge=0, description="random seed of the set")
    label_noise: float = Field(
        0.1,
        ge=0,
        le=2,
        description="standard deviation of the grader's error in grades; at 0.1 the true grades have a "
        "quadratic weighted kappa of 0.94 with the labels",
    )
    color_cast: float = Field(
        1.0, ge=0, le=3, description="spread of colors between microscopes; 0 turns it off"
    )
    lighting: float = Field(
        1.0, ge=0, le=3, description="spread of exposure, vignette and glare; 0 turns it off"
    )
    layout: LayoutName = Field("delivered", description="layout of folders, archives and label files")
    every_symptom: bool = Field(
        False, description="copy each image under each symptom that it has, as in the real set"
    )
    devices: int | None = Field(
        None, ge=1, le=10_000, description="number of microscopes; default one per 40 images, from 12 to 60"
    )


@dataclass(frozen=True)
class ImagePlan:
    """Plan of one image: all except its pixels."""

    index: int
    seed: int
    part: str
    stem: str
    grade: int  # the label
    true_grade: int
    severity: float
    symptoms: tuple[int, int, int, int, int, int]
    meta: dict[str, str]
    device: DeviceProfile
    scalp: Scalp


@dataclass(frozen=True)
class _Person:
    device: DeviceProfile
    scalp: Scalp
    severity: float  # standard normal, before the deviation per image
    epoch: int  # ms; one session
    shots: tuple[str, ...]
    meta: dict[str, str]


# --- plan --------------------------------------------------------------------------------------------------


def plan_dataset(options: SynthOptions) -> list[ImagePlan]:
    """Plan all images of a set: person, microscope, severity, label and name.

    Raises:
        UserError: more microscopes than people.
    """
    rng = np.random.default_rng([options.seed, 0])
    people = _people(options, rng)
    shots = [(person, shot) for person in people for shot in person.shots]
    latent = np.array([person.severity for person, _ in shots]) * np.sqrt(_PERSON_SHARE)
    latent = _normal_by_rank(latent + rng.normal(0, np.sqrt(1 - _PERSON_SHARE), len(shots)))
    # Scaled so that grader and truth have the same spread, hence the same shares of grades.
    error = options.label_noise * _LATENT_PER_GRADE
    seen = _normal_by_rank(latent + rng.normal(0, error, len(shots)))
    # By image as in the real set: a person is often in both parts.
    is_training = rng.permutation(options.images) < round(options.images * _TRAINING_SHARE)
    plans = []
    for index, (person, shot) in enumerate(shots):
        grade = _grade(seen[index])
        plan = ImagePlan(
            index=index,
            seed=options.seed,
            part=DELIVERED_PARTS[0] if is_training[index] else DELIVERED_PARTS[1],
            stem=f"{person.device.site}_{person.device.serial}_{person.epoch}_{shot}",
            grade=grade,
            true_grade=_grade(latent[index]),
            severity=_severity(float(latent[index])),
            symptoms=_symptoms(grade, person.scalp, rng),
            meta=person.meta | {"location": shot.split("_")[1]},
            device=person.device,
            scalp=person.scalp,
        )
        plans.append(plan)
    return plans


# Thresholds of the latent severity between grades, for the paper's shares.
_THRESHOLDS = np.array(
    [NormalDist().inv_cdf(share) for share in np.cumsum(PAPER_COUNTS)[:-1] / sum(PAPER_COUNTS)]
)
_LATENT_PER_GRADE = float(np.diff(_THRESHOLDS).mean())


def _severity(latent: float) -> float:
    """Map the standard normal latent to grade units, -0.5 to 3.5, with 0.5, 1.5, 2.5 at the thresholds.

    Values concentrate at integer grades: most images look like their grade, and some are in between, because
    graders work from one reference image per grade.
    """
    low, high = latent < _THRESHOLDS[0], latent > _THRESHOLDS[-1]
    if low or high:
        edge, base = (_THRESHOLDS[0], 0.5) if low else (_THRESHOLDS[-1], NUM_GRADES - 1.5)
        even = float(np.clip(base + (latent - edge) / _LATENT_PER_GRADE, -0.5, NUM_GRADES - 0.5))
    else:
        even = float(np.interp(latent, _THRESHOLDS, np.arange(NUM_GRADES - 1) + 0.5))
    grade = _grade(latent)
    deviation = even - grade
    return grade + deviation * (0.3 + 0.7 * (2 * deviation) ** 2)


def _grade(latent: float) -> int:
    return int(np.searchsorted(_THRESHOLDS, latent))


def _normal_by_rank(values: np.ndarray) -> np.ndarray:
    """Replace values by standard normal quantiles in the same order, so that shares are exact."""
    ranks = np.argsort(np.argsort(values))
    inverse = NormalDist().inv_cdf
    return np.array([inverse((rank + 0.5) / len(values)) for rank in ranks])


def _symptoms(grade: int, scalp: Scalp, rng: np.random.Generator) -> tuple[int, int, int, int, int, int]:
    """Draw value_1 to value_6. The 0.양호 folder holds scalps that are good in all six."""
    if grade == 0:
        return (0, 0, 0, 0, 0, 0)
    # Dry scale and sebum near exclude each other (Cramer's V 0.45).
    oily = rng.random() < (0.45, 0.14, 0.03)[grade - 1]
    sebum = 1 + int(scalp.sebum > 0.5) if oily else 0
    redness = int(np.clip(round(3 * scalp.redness + rng.normal(0, 0.5)), 0, 3))
    pustules = int(rng.random() < 0.04)
    dandruff, thinning = (int(rng.choice(4, p=(0.72, 0.18, 0.08, 0.02))) for _ in range(2))
    return grade, sebum, redness, pustules, dandruff, thinning


# --- people and microscopes --------------------------------------------------------------------------------


def _people(options: SynthOptions, rng: np.random.Generator) -> list[_Person]:
    sizes = _images_per_person(options.images, rng)
    devices = _devices(options, len(sizes), rng)
    # Each microscope has a person; the others are distributed unevenly.
    busy = rng.dirichlet(np.full(len(devices), 2.0))
    extra = rng.choice(len(devices), size=len(sizes) - len(devices), p=busy)
    chosen = rng.permutation(np.concatenate([np.arange(len(devices)), extra]))
    severities = _normal_by_rank(rng.random(len(sizes)))
    epochs = _sessions(len(sizes), rng)
    return [
        _Person(
            device=devices[device],
            scalp=_scalp(rng),
            severity=float(severity),
            epoch=epoch,
            shots=tuple(_POSITIONS[i] for i in sorted(rng.permutation(len(_POSITIONS))[:size].tolist())),
            meta=_survey(rng),
        )
        for device, severity, epoch, size in zip(chosen, severities, epochs, sizes, strict=True)
    ]


def _images_per_person(images: int, rng: np.random.Generator) -> list[int]:
    """Draw the images per person: three to five, or fewer in a set of fewer images."""
    sizes, left = [], images
    while left > 5:
        sizes.append(int(rng.integers(3, min(5, left - 3) + 1)))
        left -= sizes[-1]
    return [*sizes, left]


def _devices(options: SynthOptions, people: int, rng: np.random.Generator) -> list[DeviceProfile]:
    wanted = options.devices or min(60, max(12, options.images // 40), people)
    if wanted > people:
        raise UserError(
            f"{wanted} devices are more than the {people} people in {options.images} images; "
            f"use {people} devices or fewer, or more images"
        )
    sites = rng.choice(np.arange(1, 400), size=min(wanted, 399), replace=False)
    serials = rng.choice(np.arange(4, 10_004), size=wanted, replace=False)
    # One site in four has a second microscope.
    site_of = np.cumsum(rng.random(wanted) > 0.25) % len(sites)
    return [
        _device(f"{sites[site]:04d}", f"A2LEBJJDE{serial:05d}O", options, rng)
        for site, serial in zip(site_of, serials, strict=True)
    ]


def _device(site: str, serial: str, options: SynthOptions, rng: np.random.Generator) -> DeviceProfile:
    cast, light = options.color_cast, options.lighting
    # Red, yellow, apricot, green and blue casts occur in real images; purple ones do not.
    warm, green = np.clip(rng.normal(0, (0.11, 0.055)) * cast, (-0.35, -0.03), 0.35)
    return DeviceProfile(
        site=site,
        serial=serial,
        gains=(float(np.exp(warm - green / 2)), float(np.exp(green)), float(np.exp(-warm - green / 2))),
        exposure=float(np.clip(rng.normal(0.56, 0.05 * light), 0.35, 0.7)),
        vignette=float(np.clip(rng.normal(0.4, 0.15 * light), 0.05, 0.9)),
        light_angle=float(rng.uniform(0, 2 * np.pi)),
        lighting=light,
        blur=float(0.9 * rng.lognormal(0, 0.15)),
        noise=float(rng.uniform(0.004, 0.009)),
        quality=int(rng.integers(60, 86)),
        magnification=float(rng.uniform(0.85, 1.2)),
    )


def _scalp(rng: np.random.Generator) -> Scalp:
    tone = rng.normal(0, 1, 2)
    brown = rng.beta(1, 2)
    return Scalp(
        skin=(0.70 + 0.03 * tone[0], 0.54 + 0.04 * tone[0], 0.46 + 0.04 * tone[0] + 0.02 * tone[1]),
        redness=float(rng.beta(2, 3)),
        sebum=float(rng.beta(2, 3)),
        hairs=float(20 * rng.lognormal(0, 0.2)),
        hair_width=float(np.clip(rng.normal(8.5, 1.4), 5, 14)),
        hair_shade=float(np.clip(0.09 + 0.16 * brown + rng.normal(0, 0.02), 0.05, 0.35)),
        hair_tint=(1.0, 0.93 - 0.2 * brown, 0.88 - 0.38 * brown),
    )


def _sessions(people: int, rng: np.random.Generator) -> list[int]:
    """Draw distinct session times, epochs in ms, 10:00 to 19:00 in Korea in October and November 2020."""
    start = int(_FIRST_DAY.timestamp() * 1000)
    epochs: dict[int, None] = {}
    while len(epochs) < people:
        day, ms = int(rng.integers(_DAYS)), int(rng.integers(3_600_000, 10 * 3_600_000))
        epochs[start + day * 86_400_000 + ms] = None
    return list(epochs)


def _survey(rng: np.random.Generator) -> dict[str, str]:
    ages = ("10대", "20대", "30대", "40대", "50대", "60대")
    return {
        "gender": "남" if rng.random() < 0.42 else "여",
        "age": str(rng.choice(ages, p=(0.03, 0.25, 0.23, 0.26, 0.17, 0.06))),
    }
