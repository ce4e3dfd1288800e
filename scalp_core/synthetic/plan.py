"""Plan a synthetic set before rendering: people, microscopes, grades and names of the images."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core.errors import UserError
from scalp_core.settings import rename_old_keys
from scalp_core.synthetic.profiles import DeviceProfile, OtherSeverities, Scalp
from scalp_core.synthetic.severity import (
    PAPER_COUNTS,
    SHARES,
    GradeScale,
    OtherSymptoms,
    draw_latent,
    draw_others,
    normal_by_rank,
)

DELIVERED_PARTS = ("Training", "Validation")
_POSITIONS = ("2_TH", "3_TH", "4_LH", "5_RH", "6_BH")
_TRAINING_SHARE = 7 / 9
_FIRST_DAY = datetime(2020, 10, 13, tzinfo=UTC)
_DAYS = 48


LayoutName = Literal["delivered", "zipped", "zipped-cp949"]
DrawnSymptoms = Literal["one", "all"]


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
    symptoms: DrawnSymptoms = Field(
        "one",
        # So that the default set has the bytes that it had before this option.
        exclude_if=lambda value: value == "one",
        description="symptoms that images show; one: micro-keratin, and label files have numbers of the "
        "other five; all: the six of AI Hub",
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
    symptoms: tuple[int, ...]  # labels of all six
    meta: dict[str, str]
    device: DeviceProfile
    scalp: Scalp
    others: OtherSeverities | None = None  # drawn with `symptoms: all`


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
    is_all = options.symptoms == "all"
    scale = GradeScale(SHARES[0] if is_all else PAPER_COUNTS)
    latent = draw_latent(np.array([person.severity for person, _ in shots]), rng)
    seen = scale.judge(latent, options.label_noise, rng)
    # By image as in the real set: a person is often in both parts.
    is_training = rng.permutation(options.images) < round(options.images * _TRAINING_SHARE)
    others = _draw_others(options, people, latent) if is_all else None
    plans = []
    for index, (person, shot) in enumerate(shots):
        grade = scale.grade(seen[index])
        symptoms = (grade, *others.labels[index].tolist()) if others else _symptoms(grade, person.scalp, rng)
        plan = ImagePlan(
            index=index,
            seed=options.seed,
            part=DELIVERED_PARTS[0] if is_training[index] else DELIVERED_PARTS[1],
            stem=f"{person.device.site}_{person.device.serial}_{person.epoch}_{shot}",
            grade=grade,
            true_grade=scale.grade(latent[index]),
            severity=scale.severity(float(latent[index])),
            symptoms=symptoms,
            meta=person.meta | {"location": shot.split("_")[1]},
            device=person.device,
            scalp=person.scalp,
            others=OtherSeverities(*others.severities[index].tolist()) if others else None,
        )
        plans.append(plan)
    return plans


def _draw_others(options: SynthOptions, people: list[_Person], latent: np.ndarray) -> OtherSymptoms:
    """Draw the other five symptoms, independently of the generator that draws the rest of the plan."""
    person_of = np.repeat(np.arange(len(people)), [len(person.shots) for person in people])
    return draw_others(latent, person_of, options.label_noise, np.random.default_rng([options.seed, 2]))


def _symptoms(grade: int, scalp: Scalp, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw value_1 to value_6, without pixels. The 0.양호 folder holds scalps that are good in all six."""
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
    severities = normal_by_rank(rng.random(len(sizes)))
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
