"""Devices in training, by mocks: generators, GPUs of ranks, precision, and batches of one size."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.data.minibatches import resolve_device
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.training.distributed import ProcessGroup, SingleProcess, joined
from pyro_scvi.training.state import _generators, _set_generators
from pyro_scvi.utils.random_state import seed_generators, seeded


def test_the_generator_of_the_runs_own_device_is_kept():
    of_module = mock.Mock()
    of_module.get_rng_state.side_effect = lambda device: torch.tensor([device.index])
    second = torch.device("cuda", 1)
    with mock.patch("torch.get_device_module", return_value=of_module):
        states = _generators(second)
        _set_generators(states, second)
    assert states["cuda"].item() == 1
    of_module.set_rng_state.assert_called_once_with(states["cuda"], second)


def test_all_devices_in_use_are_seeded_and_restored():
    of_module, places = mock.Mock(), [torch.device("cuda", 0), torch.device("cuda", 1)]
    of_module.get_rng_state.side_effect = lambda device: f"before {device.index}"
    with (
        mock.patch("torch.get_device_module", return_value=of_module),
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch("torch.cuda.manual_seed_all") as seed_all,
        seeded(3),
    ):
        seed_all.assert_called_once_with(3)
    assert of_module.set_rng_state.call_args_list == [mock.call(f"before {place.index}", place) for place in places]


def test_a_device_that_is_not_in_use_is_left_alone():
    refused = mock.Mock(side_effect=RuntimeError("Cannot re-initialize CUDA in forked subprocess"))
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", refused),
        mock.patch("torch.cuda.manual_seed_all", refused),
        mock.patch("torch.cuda.get_rng_state", refused),
    ):
        ps.SCVI(8, 2)
        seed_generators(0)


def test_auto_says_why_cuda_cannot_be_used():
    refused = mock.Mock(side_effect=RuntimeError("Cannot re-initialize CUDA in forked subprocess"))
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.empty", refused),
        pytest.raises(ModelError, match="Cannot re-initialize CUDA in forked subprocess; device='cpu' can"),
    ):
        resolve_device("auto")


def ranks_with(*gpus, backend="cpu:gloo,cuda:nccl"):
    group = object.__new__(ProcessGroup)
    group.rank, group.size = 0, len(gpus)
    with (
        mock.patch.object(ProcessGroup, "_of_all", lambda self, own: list(gpus) if own else [None] * len(gpus)),
        mock.patch("torch.distributed.get_backend_config", return_value=backend),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(uuid=gpus[0])),
    ):
        group.require_own_gpus(torch.device("cuda", 0))
        group.require_own_gpus(torch.device("cpu"))


def test_ranks_that_share_a_gpu_are_refused():
    with pytest.raises(FitError, match="ranks 0, 2 of 3 do not have a GPU each"):
        ranks_with("a", "b", "a")
    ranks_with("a", "b", "c")
    ranks_with("a", "a", backend="cpu:gloo,cuda:gloo")


def test_more_ranks_than_gpus_can_join(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.set_device") as chosen,
        mock.patch.multiple(
            "torch.distributed",
            is_initialized=lambda: False,
            is_torchelastic_launched=lambda: True,
            init_process_group=mock.DEFAULT,
            destroy_process_group=mock.DEFAULT,
            get_rank=lambda: 1,
            get_world_size=lambda: 2,
        ),
        joined() as ranks,
    ):
        assert ranks.size == 2
    chosen.assert_not_called()


@pytest.mark.parametrize("device", ["auto", "mps", "cuda:7"])
def test_a_long_text_of_torch_about_a_device_is_cut(device):
    said = RuntimeError("Could not run with arguments from the 'MPS' backend. " + "registered at file, " * 300)
    with mock.patch("torch.empty", side_effect=said), pytest.raises(ModelError, match="cannot be used: Could") as cut:
        resolve_device(device)
    assert len(str(cut.value)) < 400
    assert "device='cpu' can" in str(cut.value) or "'auto' takes one that can" in str(cut.value)


def test_float64_is_refused_on_mps():
    fit = SimpleNamespace(dtype=torch.float64)
    with (
        mock.patch("pyro_scvi.training.fitted.resolve_device", return_value=torch.device("mps", 0)),
        pytest.raises(ModelError, match="MPS has no float64"),
    ):
        ps.Fit.to(fit, "mps")


@pytest.mark.parametrize(
    ("n_cells", "sizes"),
    [(16, [8, 8]), (11, [11]), (12, [8, 4]), (19, [8, 11]), (5, [5])],
)
def test_batches_on_a_gpu_have_one_size_but_the_last(n_cells, sizes):
    assert SingleProcess().batch_sizes(n_cells, 8, equal=True) == sizes


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("n_cells", [3, 16, 41, 100])
def test_ranks_make_the_same_number_of_equal_steps(n_cells, size):
    groups = [object.__new__(ProcessGroup) for _ in range(size)]
    for rank, group in enumerate(groups):
        group.rank, group.size = rank, size
    own = [group.own_batch_sizes(n_cells, 8, equal=True) for group in groups]
    assert [sum(step) for step in zip(*own, strict=True)] == groups[0].batch_sizes(n_cells, 8, equal=True)
    assert sum(map(sum, own)) == n_cells
    assert all(n >= 1 for sizes in own for n in sizes)
