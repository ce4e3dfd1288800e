"""Fixture of archives with handmade bytes."""

import pytest


@pytest.fixture
def put(tmp_path):
    def put(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return put
