"""The experiments by the name that they are asked for."""

from pyro_scvi.paper import figure1, figure2, table1, table2, table3, table4, timing
from pyro_scvi.paper.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        table1.EXPERIMENT,
        table2.EXPERIMENT,
        table3.EXPERIMENT,
        table4.EXPERIMENT,
        figure1.EXPERIMENT,
        figure2.EXPERIMENT,
        timing.EXPERIMENT,
    )
}
