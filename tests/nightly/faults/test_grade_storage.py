"""The storage of `scalp grade` is away, hurried or full: it waits or says so, and nothing is lost."""

import subprocess

import pytest

from jobs.demo_s3 import s3_server
from tests.support.disks import small_disk
from tests.support.grading import PHOTOGRAPHS, SHARD, check, put_photographs, start
from tests.support.s3_proxy import slow_proxy

REFUSED_SHARE = 0.2


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_is_waited_for(bundle, tmp_path, monkeypatch):
    source, out = "s3://scalp/photographs", "s3://scalp/out"
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        put_photographs(source)
        run = start(bundle, source, out, tmp_path / "log")
        run.wait_for(3)
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(8)  # it waits
    with s3_server(tmp_path / "s3", again=server):
        run.end()
        check(run, graded_again=0)


@pytest.mark.slow
def test_a_server_that_asks_for_less_haste_loses_nothing(bundle, s3, tmp_path):
    source, out = f"s3://scalp/{tmp_path.name}/photographs", f"s3://scalp/{tmp_path.name}/out"
    put_photographs(source)
    with slow_proxy(s3.endpoint, REFUSED_SHARE) as proxy:
        run = start(bundle, source, out, tmp_path / "log", 128, AWS_ENDPOINT_URL=proxy.endpoint)
        run.end()
    assert proxy.refused > 0.1 * PHOTOGRAPHS  # it was refused indeed
    check(run, graded_again=0)


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(bundle, tmp_path):
    source, disk = tmp_path / "photographs", tmp_path / "disk"
    put_photographs(str(source))
    with small_disk(disk, "500k"):
        run = start(bundle, str(source), str(disk / "out"), tmp_path / "log")
        printed = run.end(code=2)
        problem, fix = printed.strip().splitlines()[-2:]
        assert problem.endswith(": the disk is full")
        assert fix == "hint:  free space there and run the same command again"
        assert "Traceback" not in printed
        assert 0 < run.committed() < PHOTOGRAPHS // SHARD
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        again = start(bundle, str(source), str(disk / "out"), tmp_path / "log")
        again.end()
        check(again, graded_again=2 * SHARD)
