"""Federation: who takes part, what a round is, and what must not run."""

from privfm.federation.arm import Arm
from privfm.federation.checkpoints import load, save
from privfm.federation.compatibility import Problem, problems, problems_elsewhere
from privfm.federation.federation import Federation, RunState
from privfm.federation.loop import Step, public_sizes, refuse, refuse_problems, rounds, start
from privfm.federation.optimizers import Adam, Average, Momentum, Yogi
from privfm.federation.population import Cyclic, FixedSize, Poisson, Population, choose_malicious
from privfm.federation.record import Record, visibility
from privfm.federation.round import play
from privfm.federation.spaces import ProductGeometry

__all__ = [
    "Adam",
    "Arm",
    "Average",
    "Federation",
    "Cyclic",
    "FixedSize",
    "Momentum",
    "Poisson",
    "Population",
    "Problem",
    "ProductGeometry",
    "Record",
    "RunState",
    "Step",
    "Yogi",
    "choose_malicious",
    "load",
    "play",
    "problems",
    "problems_elsewhere",
    "public_sizes",
    "refuse",
    "refuse_problems",
    "rounds",
    "save",
    "start",
    "visibility",
]
