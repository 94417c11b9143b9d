"""The list of all experiments, by the name that the command takes."""

from pyro_scvi.paper.experiment import Experiment
from pyro_scvi.paper.figures import figure1, figure2
from pyro_scvi.paper.tables import table1, table2, table3, table4, timing

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
