"""Faults to inject: calls of the system that fail or lie, and a limit on the size of files, as a full disk has."""

import errno
import os
import resource
import signal
from contextlib import contextmanager

import pytest

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def file_size_limit(n_bytes):
    """No file of this process may grow beyond so many bytes; Python ignores the signal, calls fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def failing(owner, name, error, after=0, again=True):
    """Calls of a function raise from the one numbered ``after`` on, or that one alone."""
    calls, original = [], getattr(owner, name)

    def call(*arguments, **options):
        calls.append(arguments)
        number = len(calls) - 1
        if number == after or (again and number > after):
            raise error
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


def disk_error(number):
    return OSError(number, os.strerror(number))


@contextmanager
def interrupts_raise():
    """SIGINT raises KeyboardInterrupt, also where tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
