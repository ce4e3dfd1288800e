"""How a grading run uses a cluster: it fits, and it leaves room for what feeds the models."""

import pytest

from cluster.resources import Cluster
from jobs.common.inference import ModelOptions
from jobs.grade.planning import PoolOptions, plan_run
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.inference.torch_runtime import choose_bucket, largest_bucket

LAPTOP = Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2)
TWO_CPUS = Cluster(cpus=2, gpus=0, nodes=1, cores_per_node=2)
FOUR_NODES = Cluster(cpus=64, gpus=0, nodes=4, cores_per_node=16)
EIGHT_GPUS = Cluster(cpus=128, gpus=8, nodes=2, cores_per_node=64)


@pytest.fixture
def plan(bundle):
    loaded = load_bundle(str(bundle))
    loaded.fetch("float").fetch("weights")
    return lambda cluster, **chosen: plan_run(cluster, loaded, ModelOptions(), PoolOptions(**chosen))


@pytest.mark.parametrize(
    ("cluster", "models", "cpus", "loaders"),
    [(LAPTOP, 2, 1, 2), (TWO_CPUS, 1, 1, 1), (FOUR_NODES, 28, 2, 7), (EIGHT_GPUS, 16, 1, 111)],
)
def test_models_and_loading_tasks_fit_beside_each_other(plan, cluster, models, cpus, loaders):
    chosen = plan(cluster)
    assert (chosen.models, chosen.cpus_per_model, chosen.loaders) == ((models, models), cpus, loaders)
    assert models * cpus + 1 <= cluster.cpus
    assert chosen.shard_size == (512 if cluster.gpus else 128)


@pytest.mark.parametrize(
    ("pool", "models", "share"),
    [
        ({}, 16, 0.5),
        ({"gpus_per_model": 1}, 8, 1),
        ({"gpus_per_model": 0.25}, 32, 0.25),
        ({"models": (4, 8)}, 8, 1),
    ],
)
def test_two_models_share_a_gpu_unless_something_else_is_asked(plan, pool, models, share):
    chosen = plan(EIGHT_GPUS, **pool)
    assert chosen.models[1] == models
    assert f"each 1 CPU and {share:g} GPU" in str(chosen)


@pytest.mark.parametrize(
    ("cluster", "pool"),
    [
        (Cluster(cpus=1, gpus=0, nodes=1, cores_per_node=1), {}),
        (TWO_CPUS, {"models": (2, 2)}),
        (FOUR_NODES, {"cpus_per_model": 32}),
        (EIGHT_GPUS, {"models": (17, 20)}),
        (Cluster(cpus=4, gpus=8, nodes=1, cores_per_node=4), {"models": (8, 8)}),
    ],
)
def test_what_the_cluster_can_never_hold_is_refused_and_not_waited_for(plan, cluster, pool):
    with pytest.raises(UserError, match="room for .* models of .* use --replicas"):
        plan(cluster, **pool)


def test_a_shard_that_no_block_holds_is_refused(plan):
    with pytest.raises(UserError, match="--shard-size 100000: its pixels take"):
        plan(LAPTOP, shard_size=100_000)


def test_a_small_gpu_gets_smaller_batches():
    # A photograph of 224 px takes about 25 MiB of a forward pass in bf16.
    sizes = [largest_bucket(25 * 2**20, gib * 2**30) for gib in (80, 8, 2, 0)]
    assert sizes == [128, 128, 32, 1]


def test_a_batch_is_padded_to_a_captured_shape_rather_than_given_a_new_one():
    assert [choose_bucket(count, {128}) for count in (1, 100, 128)] == [128, 128, 128]
    assert [choose_bucket(count, {1, 8, 32, 128}) for count in (1, 2, 9, 33)] == [1, 8, 32, 128]
    assert [choose_bucket(count, {}) for count in (1, 2, 33)] == [1, 8, 128]
    assert choose_bucket(33, {1, 8, 32}) == 128
