"""A Ray that `cluster.local.connect` started: what its processes know, and what dies in it."""

import os

import pytest
import ray

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote(num_cpus=0)
def known() -> str | None:
    return os.environ.get("RAY_ADDRESS")


def test_its_processes_find_their_own_ray_and_the_driver_s_environment_is_as_it_was():
    before = os.environ.get("RAY_ADDRESS")
    assert ray.get(known.remote()) == ray.get_runtime_context().gcs_address
    assert os.environ.get("RAY_ADDRESS") == before


class DiesOnce:
    """As a model whose process is lost while it loads."""

    def __init__(self, mark) -> None:
        if not mark.exists():
            mark.touch()
            os._exit(1)

    def __call__(self, batch: dict) -> dict:
        return batch


def test_a_process_that_dies_while_it_loads_is_started_again(tmp_path):
    rows = ray.data.range(8, override_num_blocks=1).map_batches(
        DiesOnce, fn_constructor_args=(tmp_path / "mark",), concurrency=1, num_cpus=1
    )
    assert sorted(row["id"] for row in rows.take_all()) == list(range(8))
    assert (tmp_path / "mark").exists()
