"""The experiments by the name that they are asked for."""

from pyro_scvi.paper import figure1, figure2, timing
from pyro_scvi.paper.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (figure1.EXPERIMENT, figure2.EXPERIMENT, timing.EXPERIMENT)
}
