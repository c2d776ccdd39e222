"""An experiment: arms and seeds, each a run in a folder of its own, played by worker processes."""

from privfm.experiment.config import ArmSpec, RunConfig, resolved
from privfm.experiment.run import arm_of, deal, play_run, prepare
from privfm.experiment.runner import Experiment, run_experiment
from privfm.experiment.visibility import visibility

__all__ = [
    "ArmSpec",
    "Experiment",
    "RunConfig",
    "arm_of",
    "deal",
    "play_run",
    "prepare",
    "resolved",
    "run_experiment",
    "visibility",
]
