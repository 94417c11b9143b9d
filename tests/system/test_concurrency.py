"""Fits in several threads and processes give what they give alone."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import pyro
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.utils import random_state
from tests.support.fits_elsewhere import fitted


def test_fits_in_threads_equal_those_in_turn():
    in_turn = [fitted(seed) for seed in range(4)]
    state, interval = torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # let threads change places all the time
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(fitted, range(4))) == in_turn
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(state, torch.get_rng_state())
    assert not pyro.get_param_store().keys()


def test_models_made_in_another_thread_do_not_see_a_fit():
    """A model's prior is asked for its shape under Pyro's handlers, which are the process's."""
    alone, stop, made = fitted(0), threading.Event(), []

    def make():
        while not stop.is_set():
            made.append(ps.guides.DiagonalNormal(ps.SCVI(8, 2, n_hidden=8)))

    thread = threading.Thread(target=make)
    thread.start()
    try:
        assert fitted(0) == alone
    finally:
        stop.set()
        thread.join()
    assert made


def test_fits_in_spawned_processes_equal_those_in_turn():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(fitted, range(2))) == [fitted(seed) for seed in range(2)]


@pytest.mark.slow
def test_fits_in_workers_of_joblib_equal_those_in_turn():
    found = joblib.Parallel(n_jobs=2)(joblib.delayed(fitted)(seed) for seed in range(4))
    assert found == [fitted(seed) for seed in range(4)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with random_state.in_turn():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(5)  # which ends a child that waits
        with random_state.in_turn():
            os._exit(0)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
