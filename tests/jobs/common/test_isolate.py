"""A call that ends its process costs an error of one image; a shard's tries are counted."""

import os
import signal

import pytest

from jobs.common.isolate import MOST_TRIES, Isolation, counted_try
from scalp_core import storage
from scalp_core.errors import ImageError
from tests.support import crashes


def decode(data):
    if data == b"killer":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"odd":
        raise ImageError("corrupt", "odd")
    return data.upper()


@pytest.mark.medium
def test_a_call_that_kills_its_process_is_one_error_and_the_next_call_works():
    with Isolation() as child:
        assert child.call(decode, b"a") == b"A"
        with pytest.raises(ImageError) as crashed:
            child.call(decode, b"killer")
        assert crashed.value.code == "crashed"
        assert child.call(decode, b"b") == b"B"
        with pytest.raises(ImageError) as odd:
            child.call(decode, b"odd")
        assert odd.value.code == "corrupt"


def one_try(folder, isolated):
    with counted_try(folder) as alone:
        assert alone == isolated
        os.kill(os.getpid(), signal.SIGKILL)


def test_tries_that_ended_their_process_are_counted_and_others_are_not(tmp_path):
    folder = str(tmp_path / "tries" / "0001")
    with pytest.raises(OSError, match="away"), counted_try(folder):
        raise OSError("away")
    for _ in range(MOST_TRIES):
        with pytest.raises(AssertionError, match="-9"):
            crashes.run(one_try, folder, False)
    with counted_try(folder) as alone:
        assert alone
    assert len(storage.names_in(folder)) == MOST_TRIES
