"""Meaning of the ratios in `summary.json`, for the generated tables of docs/benchmarks.md."""

from __future__ import annotations

from typing import NamedTuple


class Ratio(NamedTuple):
    """Meaning of a ratio.

    Args:
        better: `higher` or `lower` with 1 as the limit, a goal (`0`, `1`, `yes`, `2 or less`), or empty.
        meaning: What is divided by what.
    """

    better: str
    meaning: str


_DAFT_ENGINE = "Daft with scalp's engine, which does not start Ray"
_BETTER_LITSERVE = "LitServe with PyTorch, the better number of workers"
_ORDERS = {
    "informative": "the least certain images",
    "diverse": "uncertain images that look different",
}
_GAINS = {
    "gain": "gain of kappa",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
}

RATIOS: dict[str, dict[str, Ratio]] = {
    "engine": {
        "bare_vs_plain": Ratio(
            "higher", "rate of the fastest bare model in bf16, in any runtime, to that of plain PyTorch"
        ),
        "bare_vs_tuned": Ratio(
            "higher", "rate of the fastest bare model in bf16, in any runtime, to that of tuned PyTorch"
        ),
        "end_to_end_vs_bare": Ratio(
            "higher",
            "rate from bytes to grade, to that of the bare model; 1 would mean that decoding is free",
        ),
        "int8_end_to_end_vs_bare": Ratio(
            "higher", "rate of int8 from bytes to grade, to that of the bare int8 model"
        ),
        "batch1_latency_vs_bare": Ratio("lower", "latency of a single image, to that of the bare model"),
        "int8_vs_bf16": Ratio("higher", "rates of the bare model, both in OpenVINO"),
        "end_to_end_vs_plain": Ratio("higher", "rate from bytes to grade, to that of plain PyTorch"),
    },
    "symptoms": {
        "train_seconds_six_vs_one": Ratio("lower", "training time of six symptoms, to that of one"),
    },
    "out-of-distribution": {
        "mean_auroc_gates": Ratio("", "statistics, as in the gates; mean of the kinds but other scalps"),
        "mean_auroc_mahalanobis": Ratio("", "features: distance to the nearest grade"),
        "mean_auroc_neighbor": Ratio("", "features: angle to the tenth nearest training image"),
        "mean_auroc_energy": Ratio("", "energy of the logits"),
        "mean_auroc_top_probability": Ratio("", "the top probability"),
    },
    "train": {
        "vs_torchrun": Ratio(
            "higher", "rate of several workers, to the tuned loop with `torchrun`: the cost of Ray"
        ),
        "default_vs_tuned_loop": Ratio("higher", "rate of one worker, to the tuned loop in one process"),
        "one_worker_vs_tuned_loop": Ratio("higher", "rate of one worker, to the tuned loop in one process"),
        "vs_plain": Ratio("higher", "rate of `scalp train` with all cores, to the plain loop with all cores"),
        "data_wait_share": Ratio("lower", "fraction of an epoch in which the workers wait for images"),
        "scaling_2_workers": Ratio("higher", "rate of two workers, to that of one"),
        "torchrun_scaling_2_processes": Ratio(
            "higher", "the same of the tuned loop: the limit of this machine"
        ),
    },
    "bulk": {
        "vs_engine": Ratio("higher", "steady rate, to that of the engine alone"),
        "vs_plain": Ratio("higher", "whole run of the plain loop, to that of `scalp grade`"),
        "vs_tuned": Ratio("higher", "whole run of the tuned loop, to that of `scalp grade`"),
        "vs_daft": Ratio("higher", "whole run of Daft with PyTorch, to that of `scalp grade`"),
        "vs_daft_s3": Ratio("higher", "the same, both from S3"),
        "vs_daft_with_our_engine": Ratio("higher", f"whole run of {_DAFT_ENGINE}, to that of `scalp grade`"),
        "steady_vs_daft": Ratio("higher", "steady rate, to that of Daft with PyTorch"),
        "steady_vs_daft_with_our_engine": Ratio("higher", "steady rate, to that of Daft with scalp's engine"),
        "s3_vs_local": Ratio("higher", "steady rate from S3, to that from the disk"),
        "zip_vs_prefix": Ratio("higher", "steady rate from a zip in S3, to that from a prefix of files"),
        "with_bad_files": Ratio("higher", "steady rate with a tenth of bad files, to that without"),
    },
    "nodes": {
        "efficiency_2_nodes": Ratio("1", "rate of 2 nodes, to twice that of one"),
        "efficiency_4_nodes": Ratio("1", "rate of 4 nodes, to four times that of one"),
    },
    "serve": {
        **{
            f"rps_vs_litserve_c{clients}": Ratio(
                "higher", f"images per second at {clients} clients, to {_BETTER_LITSERVE}"
            )
            for clients in (8, 16, 32)
        },
        **{
            f"rps_vs_litserve_with_our_engine_c{clients}": Ratio(
                "higher", f"images per second at {clients} clients, to LitServe with scalp's engine"
            )
            for clients in (8, 16, 32)
        },
        "rps_vs_fastapi_c8": Ratio("higher", "images per second at 8 clients, to FastAPI with PyTorch"),
        "p50_vs_litserve_c1": Ratio("lower", f"latency of one client, to {_BETTER_LITSERVE}"),
        "p50_vs_litserve_with_our_engine_c1": Ratio(
            "lower", "latency of one client, to LitServe with scalp's engine"
        ),
        "failed_under_fault": Ratio("0", "failed calls around the kill, with the client's retries"),
        "failed_without_retries": Ratio("0", "calls that would have failed without them"),
    },
    "overload": {
        "accepted_p99_vs_allowed": Ratio(
            "1 or less",
            "p99 of accepted requests, to three times the p99 alone plus `limits.queue_seconds`",
        ),
        "lost_share": Ratio("0", "fraction neither answered nor refused"),
        "refused_share": Ratio("", "fraction refused with 503 and `Retry-After`: about half"),
        "accepted_vs_capacity": Ratio(
            "1", "answers per second, to those before the overload; refusing costs the rest"
        ),
        "memory_last_vs_first": Ratio("1", "memory in the last third of the overload, to the first"),
        "p99_after_vs_before": Ratio("1", "p99 of one client, right after the overload to before"),
    },
    "overload-hostile": {
        "worst_p50_vs_alone": Ratio(
            "2 or less", "p50 of the ordinary client in the worst attack, to that without an attack"
        ),
        "worst_p99_vs_alone": Ratio("2 or less", "the same of p99"),
        "not_answered_share": Ratio("0", "fraction of the ordinary client's requests without an answer"),
        "attacks_above_twofold": Ratio("0", "of eight attacks, by p50 or p99"),
    },
    "autoscale": {
        "most_graders": Ratio("", "graders reached, of three allowed"),
        "failed": Ratio("0", "failed requests"),
    },
    "grow": {
        "most_nodes": Ratio("", "largest number of nodes, of three allowed"),
        "nodes_at_end": Ratio("0", "nodes that did not end"),
        "seconds_to_first_node": Ratio("", "from no node, after the job requests one"),
        "seconds_to_none_after_end": Ratio("", "with an idle time of 20 s"),
        "rows_unaccounted": Ratio("0", "images without exactly one row"),
    },
    "active": {
        f"{name}_qwk_{key}": Ratio("", f"{what} of the answers to {images}, to that of random images")
        for name, images in _ORDERS.items()
        for key, what in _GAINS.items()
    },
    "active-trained": {
        f"{name}_qwk_{key}": Ratio("", f"{what} of the answers to {images}, to that of random images")
        for name, images in _ORDERS.items()
        for key, what in {
            **_GAINS,
            "groups_low": "lower end of the interval over the test microscopes",
            "groups_high": "upper end of the interval over the test microscopes",
        }.items()
    },
    "scale": {
        "rate_last_vs_first": Ratio(
            "higher",
            "objects per second of the largest source, to the smallest, which is mostly the start of Ray",
        ),
        "driver_memory_last_vs_first": Ratio("1", "memory of the driver; 1 means that it does not grow"),
        "driver_memory_simulated_vs_first": Ratio("1", "the same for the simulated objects"),
    },
    "scale-grade": {
        "rate_last_vs_first": Ratio("1", "steady rate of the largest run, to the smallest"),
        "rate_most_vs_least": Ratio("1", "steady rate of the fastest run, to the slowest"),
        "driver_memory_last_vs_first": Ratio("1", "memory of the driver; 1 means that it does not grow"),
    },
    "demo": {
        "qwk": Ratio("", "quadratic weighted kappa, on microscopes that were not trained on"),
        "top1": Ratio("", "fraction with the right grade"),
        "majority_top1": Ratio("", "the same of a classifier that answers the most common grade"),
        "online_equals_bulk": Ratio("yes", "the endpoint and `scalp grade` gave the same answers"),
        "rows_unaccounted": Ratio("0", "images without exactly one row"),
        "seconds": Ratio("", "the whole demo"),
    },
}  # fmt: skip
RATIOS["engine-compared"] = RATIOS["engine"]


def score(better: str, value: float | bool) -> float:
    """How good a value is: below 1 scalp loses or misses the goal; 1 if nothing is better."""
    number = float(value)
    if better == "higher":
        return number
    if better == "1":
        return min(number, 1 / number)
    if better == "yes":
        return number * 1e9
    if better in ("lower", "0") or better.endswith(" or less"):
        goal = 1.0 if better == "lower" else float(better.split()[0])
        return (goal or 1e-9) / (number or 1e-9) if goal or number else 1e9
    return 1.0
