"""The promotion policy `promotion.yaml`: what a version must show before it is promoted.

It is a predetermined change control plan that a program checks. Each rule is decided by a confidence bound
over groups, so few images and few microscopes do not pass a rule by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.evaluation import paired
from scalp_core.evaluation.bootstrap import upper_bound
from scalp_core.evaluation.paired import LOWER_IS_BETTER, Answers
from scalp_core.settings import parse_settings

POLICY_FILE = "promotion.yaml"

Share = Annotated[float, Field(ge=-1, le=1)]
Metric = Literal[
    "qwk", "top1", "recall_good", "recall_mild", "recall_moderate", "recall_severe", "coverage", "referred",
    "wrong_among_answered",
]  # fmt: skip


class Rule(BaseModel):
    """One line of a policy: a floor, a ceiling, or the largest loss against the promoted version."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    metric: Metric = Field(description="a metric of scalp evaluate A B")
    at_least: Share | None = Field(None, description="floor of the metric")
    at_most: Share | None = Field(None, description="ceiling of `referred` and `wrong_among_answered`")
    max_loss: Share | None = Field(None, description="largest loss against the promoted version")
    where: dict[Literal["device", "position", "sex", "age"], str] = Field(
        {}, description="slice: values of the manifest's columns; default: all images"
    )

    @model_validator(mode="after")
    def _check(self) -> Rule:
        wrong_side = "at_least" if self.metric in LOWER_IS_BETTER else "at_most"
        if sum(value is not None for value in (self.at_least, self.at_most, self.max_loss)) != 1:
            raise ValueError("give one of at_least, at_most and max_loss")
        if getattr(self, wrong_side) is not None:
            raise ValueError(f"{wrong_side} does not fit {self.metric}; use the other one, or max_loss")
        return self

    def __str__(self) -> str:
        bound = next(
            f"{name.replace('_', ' ')} {value:g}"
            for name in ("at_least", "at_most", "max_loss")
            if (value := getattr(self, name)) is not None
        )
        return " ".join(
            [f"{self.metric} {bound}", *(f"{name}={value}" for name, value in self.where.items())]
        )


class Policy(BaseModel):
    """The content of `promotion.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    data: list[str] = Field(description="fingerprints of the data that may be used: sha256 in data.json")
    rules: list[Rule] = Field(min_length=1)
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="one-sided confidence of each bound"
    )


class RuleResult(BaseModel):
    """A rule and what the version showed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    line: int = Field(description="line of the rule in the policy file")
    rule: str
    images: int
    groups: int
    value: float | None = Field(description="metric, or loss against the promoted version; None if undefined")
    bound: float | None = Field(description="worst value with the confidence of the policy; None without one")
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        if self.value is None or self.bound is None:
            return f"{self.rule}: {self.note} ({self.images:,} images, {self.groups} groups)"
        return (
            f"{self.rule}: it is {self.value:.3f} and may be {self.bound:.3f} "
            f"({self.images:,} images, {self.groups} groups)"
        )


class PolicyResult(BaseModel):
    """The decision of a policy about a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_sha256: str = Field(description="hash of the policy file")
    policy: Policy
    data_sha256: str
    results: list[RuleResult]


class PolicyFile(BaseModel):
    """A policy with its place, its hash, and the lines of its rules."""

    model_config = ConfigDict(frozen=True)

    uri: str
    sha256: str
    policy: Policy
    lines: list[int]

    def check_data(self, data: str, data_sha256: str) -> None:
        """Raise a `UserError` if the policy does not name this data."""
        if data_sha256 not in self.policy.data:
            raise UserError(
                f"{self.uri}: data does not list {data} (fingerprint {data_sha256}); use data that it lists"
            )

    def decide(
        self,
        labels: np.ndarray,
        candidate: Answers,
        promoted: Answers | None,
        groups: Sequence[Any],
        columns: Mapping[str, Sequence[str | None]],
        data_sha256: str,
    ) -> PolicyResult:
        """Check each rule.

        Args:
            labels: int (N,), 0..3.
            candidate: Answers of the version.
            promoted: Answers of the promoted version to the same images; None if there is none.
            groups: (N,), the microscope or session of each image.
            columns: Values (N,) of the manifest's columns that rules may name.
            data_sha256: Fingerprint of the data.

        Raises:
            UserError: A rule fails; the message has its line.
        """
        results = []
        for line, rule in zip(self.lines, self.policy.rules, strict=True):
            inside = np.ones(len(labels), bool)
            for name, value in rule.where.items():
                inside &= np.array([cell == value for cell in columns[name]], bool)
            models = [
                Answers(*(values[inside] for values in answers))
                for answers in (candidate, promoted)
                if answers is not None
            ]
            groups_inside = np.asarray(groups, dtype=str)[inside]
            results.append(_decide(rule, line, labels[inside], models, groups_inside, self.policy.confidence))
        failed = [result for result in results if not result.passed]
        if failed:
            lines = " and ".join(f"line {result.line}: {result}" for result in failed)
            raise UserError(f"{self.uri}, {lines}; more images narrow a bound, if the value itself is good")
        return PolicyResult(
            policy_sha256=self.sha256, policy=self.policy, data_sha256=data_sha256, results=results
        )


def load_policy(uri: str) -> PolicyFile:
    """Read a policy file, local or `s3://`.

    Raises:
        UserError: It is missing, is not valid YAML, or has an unknown, repeated or invalid key.
    """
    data = storage.read(uri)
    try:
        root = yaml.compose(data, yaml.SafeLoader)
        values = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{uri} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{uri} must hold lines of the form key: value")
    _refuse_repetition(root, uri)
    policy = parse_settings(Policy, values, uri)
    (rules,) = (value for key, value in root.value if key.value == "rules")
    lines = [rule.start_mark.line + 1 for rule in rules.value]
    return PolicyFile(uri=uri, sha256=hashlib.sha256(data).hexdigest(), policy=policy, lines=lines)


def _refuse_repetition(node: yaml.Node, uri: str) -> None:
    """Refuse a repeated key, of which YAML would silently drop the first value."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise UserError(f"{uri}, line {key.start_mark.line + 1}: {key.value!r} is repeated")
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_repetition(part, uri)


def _decide(
    rule: Rule,
    line: int,
    labels: np.ndarray,
    models: Sequence[Answers],
    groups: np.ndarray,
    confidence: float,
) -> RuleResult:
    """Check one rule on the images of its slice; `models` are the version and, if any, the promoted one."""
    count = len(set(groups.tolist()))

    def result(value: float | None, bound: float | None, passed: bool, note: str = "") -> RuleResult:
        return RuleResult(
            line=line, rule=str(rule), images=len(labels), groups=count, value=value, bound=bound,
            passed=passed, note=note,
        )  # fmt: skip

    if rule.max_loss is not None and len(models) == 1:
        return result(None, None, True, "no version is promoted")
    if not len(labels):
        return result(None, None, False, "no images")
    values, _ = paired.resample_answers(labels, models, groups.tolist())
    sign = 1 if rule.metric in LOWER_IS_BETTER else -1  # a larger badness is worse
    badness = sign * values[0][rule.metric]
    if rule.max_loss is not None:
        badness, limit = badness - sign * values[1][rule.metric], rule.max_loss
    elif rule.at_least is not None:
        limit = -rule.at_least
    else:
        limit = rule.at_most or 0.0
    if np.isnan(badness[0]):
        return result(None, None, False, "the metric is undefined for these images")
    bound = upper_bound(badness[1:], count, confidence)
    if bound is None:
        return result(float(badness[0]), None, False, "one group has no confidence bound")
    bound = max(bound, float(badness[0]) + paired.unseen_loss(rule.metric, labels, models[0], confidence))
    shown = 1 if rule.max_loss is not None else sign
    return result(shown * float(badness[0]), shown * bound, bool(bound <= limit))
