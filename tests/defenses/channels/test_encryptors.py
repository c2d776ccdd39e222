"""Several processes: order, errors, and what happens when one dies. Real encryption is in the tests of the channels."""

import operator
import signal

import numpy as np
import pytest

from privfm.checks import ClientFailed, InvalidArgument
from privfm.defenses.channels import encryptors
from privfm.defenses.channels.encryptors import close, encrypted


@pytest.fixture(autouse=True)
def no_processes():
    close()
    yield
    close()


def test_one_process_starts_none_and_needs_no_importable_function():
    got = encrypted(
        lambda key, chunk: key + bytes(chunk), b"k", [np.array([1, 2], np.uint8), np.array([3], np.uint8)], 1
    )
    assert got == [b"k\1\2", b"k\3"]
    assert encrypted(lambda key, chunk: key, b"k", [np.zeros(1)], 8) == [b"k"]  # one chunk needs one process
    assert encrypted(lambda key, chunk: key, b"k", [], 8) == []
    assert not encryptors._pools


@pytest.mark.parametrize("processes", [0, -1, 1.5])
def test_a_strange_number_of_processes_is_refused(processes):
    with pytest.raises(InvalidArgument, match="processes="):
        encrypted(np.full, 1, [], processes)


def test_processes_keep_the_order_report_errors_are_kept_and_replaced_when_they_die():
    chunks = [np.array(i) for i in range(7)]
    assert [int(value[0]) for value in encrypted(np.full, 1, chunks, 2)] == list(range(7))
    workers = set(encryptors._pools[2]._processes)
    with pytest.raises(ValueError, match="negative"):
        encrypted(np.full, -1, chunks, 2)  # an error of the function itself comes through
    encrypted(np.full, 1, chunks, 2)
    assert set(encryptors._pools[2]._processes) == workers
    with pytest.raises(ClientFailed, match="an encrypting process died"):
        encrypted(operator.call, signal.raise_signal, [signal.SIGKILL] * 2, 2)  # the worker kills itself
    assert not encryptors._pools
    assert len(encrypted(np.full, 1, chunks, 2)) == 7
