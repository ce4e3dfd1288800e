"""Compare the metrics that Ray's agents export with the queries of dashboards and alerts."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import promql_parser
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families

DASHBOARDS = Path(__file__).parents[2] / "cluster/dashboards"
ALERTS = sorted(DASHBOARDS.glob("*-alerts.yaml"))
# Grafana's, and what stands for them.
_VARIABLES = {"$__rate_interval": "5m", "$application": "scalp", "$run": ".+"}


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


class MetricQuery(NamedTuple):
    """Query of a dashboard or an alert: its title, PromQL, and the text with its labels."""

    where: str
    expression: str
    text: str


def metrics_uris() -> list[str]:
    """URLs of the Prometheus metrics of each node of the connected Ray."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def scrape() -> list[Sample]:
    """Scrape the samples that the agents of the connected Ray export at this moment."""
    return _samples(httpx.get(uri, timeout=10).text for uri in metrics_uris())


class MetricsWatch:
    """All samples that the agents exported while a block ran, each with its last value.

    A scrape clears the gauges until they are set again, so one object does all scrapes of the block.
    """

    def __init__(self) -> None:
        self._series: dict[str, str] = {}  # the last line of each
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat)

    @property
    def samples(self) -> list[Sample]:
        return _samples(["\n".join(list(self._series.values())) + "\n"])

    def await_total(self, name: str, value: float, **labels: str) -> None:
        """Wait until a counter has reached `value`."""
        until = time.monotonic() + 120
        while total(self.samples, name, **labels) < value:
            assert time.monotonic() < until, f"{name} did not reach {value}"
            time.sleep(0.5)

    def _scrape(self) -> None:
        with suppress(httpx.TransportError):  # an agent that is still starting
            for uri in metrics_uris():
                lines = httpx.get(uri, timeout=10).text.splitlines()
                self._series.update((line.rpartition(" ")[0], line) for line in lines if line[:1] != "#")

    def _repeat(self) -> None:
        while not self._over.wait(2):
            self._scrape()

    def __enter__(self) -> MetricsWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._scrape()


def _samples(pages: Iterable[str]) -> list[Sample]:
    families = [family for page in pages for family in text_string_to_metric_families(page)]
    return [Sample(each.name, each.labels, each.value) for family in families for each in family.samples]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def dashboard_queries(name: str) -> list[MetricQuery]:
    """Queries of `cluster/dashboards/NAME.json`."""
    found = []
    for panel in json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in _VARIABLES.items():
                expression = expression.replace(variable, value)
            found.append(MetricQuery(panel["title"], expression, target["legendFormat"]))
    return found


def alerts(path: Path) -> list[dict]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alert_queries(name: str) -> list[MetricQuery]:
    """Queries of `cluster/dashboards/NAME-alerts.yaml`."""
    rules = alerts(DASHBOARDS / f"{name}-alerts.yaml")
    return [
        MetricQuery(rule["alert"], rule["expr"], " ".join(rule["annotations"].values())) for rule in rules
    ]


def unanswered(queries: list[MetricQuery], samples: list[Sample], exempt: Iterable[str]) -> list[str]:
    """Metrics and labels that are queried and not exported.

    Args:
        queries: of dashboards and alerts.
        samples: that are exported.
        exempt: metrics that need not be there.
    """
    missing = []
    for where, expression, text in queries:
        selectors, asked, labels = _parts(expression)
        assert selectors, where
        for selector in selectors:
            matchers = selector.matchers.matchers
            chosen = [
                each
                for each in samples
                if each.name == selector.name and all(_matches(each, matcher) for matcher in matchers)
            ]
            labels |= {label for each in chosen for label in each.labels}
            if not chosen and selector.name not in exempt:
                missing.append(f"{where}: {selector}")
        asked |= set(re.findall(r"{{\s*(?:\$labels\.)?(\w+)\s*}}", text))
        if selectors[0].name not in exempt:
            missing += [f"{where}: label {label}" for label in asked - labels]
    return missing


def _matches(sample: Sample, matcher: promql_parser.Matcher) -> bool:
    if matcher.name == "status":  # no request failed in the server
        return matcher.name in sample.labels
    value, op = sample.labels.get(matcher.name, ""), promql_parser.MatchOp
    pattern = re.escape(matcher.value) if matcher.op in (op.Equal, op.NotEqual) else matcher.value
    return bool(re.fullmatch(pattern, value)) == (matcher.op in (op.Equal, op.Re))


def _parts(expression: str) -> tuple[list[promql_parser.VectorSelector], set[str], set[str]]:
    """Selectors of a query, its grouping labels, and the labels that it creates."""
    selectors, groupings, made = [], set(), set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            selectors.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            groupings.update(node.modifier.labels)
        elif isinstance(node, promql_parser.Call) and node.func.name == "label_replace":
            made.add(node.args[1].val)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return selectors, groupings, made
