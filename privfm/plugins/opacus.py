"""For who already trains with Opacus: its accountant's history as a complete statement, and checks before believing it.

model, optimizer, loader = engine.make_private(module=..., wrap_model=False, ...)
for batch in loader:
    loss(...).backward()
    check_private_model(module, optimizer)     # of the first steps, at least
    optimizer.step()
print(epsilon_record(engine, optimizer, loader, delta=1e-5))
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any

from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from torch import Tensor, nn

from privfm.checks import PrivacyBroken, fraction, require
from privfm.defenses.privacy import EpsilonRecord
from privfm.defenses.privacy.accounting import RDP_ORDERS, SampledGaussian, account, event
from privfm.plugins.guards import check_optimizer, listed, trained_parameters

History = Sequence[tuple[float, float, int]]
"""(noise multiplier, sampling rate, steps) of each stretch of training, as Opacus's accountants keep it."""


def check_private_model(model: nn.Module, optimizer: DPOptimizer) -> None:
    """Between `backward()` and `step()`: whether every trained parameter has a gradient of every example.

    A factor of an adapter without one is neither clipped nor noised nor trained, silently. Zero gradients are fine: a
    factor A has them while its B is zero.

    Args:
      model: the user's own, or the wrapped one.
      optimizer: what `make_private` returned.

    Raises:
      InvalidArgument: the optimizer holds other parameters than the model's trained ones.
      PrivacyBroken: a parameter has no gradients of examples, or not as many as the others.
    """
    parameters = trained_parameters(model)
    check_optimizer(parameters, optimizer)
    counts = {name: _examples(p) for name, p in parameters.items()}
    without = [name for name, count in counts.items() if count is None]
    if without:
        raise PrivacyBroken(
            f"{listed(without)} of {len(counts)} trained parameters have no gradient of single examples: they are not "
            "protected, and not trained; call this after backward(), give the model its adapters before make_private, "
            "use grad_sample_mode='hooks', or freeze them"
        )
    if len(set(counts.values())) > 1:
        raise PrivacyBroken(f"gradients of different numbers of examples: {counts}")


def epsilon_record(engine: PrivacyEngine, optimizer: DPOptimizer, loader: Any, delta: float) -> EpsilonRecord:
    """What the steps counted by an engine's accountant are worth, accounted anew by dp-accounting.

    | case                                                          | what happens                                   |
    |---------------------------------------------------------------|------------------------------------------------|
    | one noise multiplier and rate                                 | the accountants of `privfm.defenses.privacy`   |
    | several, of a schedule or of rounds                           | RDP of all together: an upper bound            |
    | a loader without Poisson sampling                             | refused: the history's rate is not what was    |
    | another rate than the history's (gradients accumulated, too)  | done                                           |
    | adaptive clipping, or an optimizer of another class           | refused: its other release is not read here    |
    | an optimizer whose steps another engine counts, or none       | refused: epsilon would be 0                    |
    | no step yet                                                   | epsilon 0                                      |

    Opacus's own `get_epsilon` bounds the same for data sets with one example more or less; here the sampling rate and
    the denominator are public, so that an example becomes zero instead: the same number.

    Args:
      engine: whose accountant was attached to the optimizer.
      optimizer: what `make_private` returned, clipping flat or per layer. Opacus does not mask gradients that are not
        finite: one such example makes all weights NaN.
      loader: what `make_private` returned, of this client's data.
      delta: below one over the number of examples.

    Raises:
      InvalidArgument: what would make the number a lie; see the table.
    """
    fraction("delta", delta, one=False)
    require(
        isinstance(loader, DPDataLoader),
        f"loader is a {type(loader).__name__}: without Poisson sampling (poisson_sampling=True) the accountant's rate "
        "amplifies nothing",
    )
    require(
        type(optimizer) in {DPOptimizer, DPPerLayerOptimizer},
        f"optimizer is a {type(optimizer).__name__}: expected clipping='flat' or 'per_layer'",
    )
    require(
        _counts(engine, optimizer),
        "engine does not count this optimizer's steps: its accountant knows nothing of them, or of other ones; give "
        "the engine whose make_private returned the optimizer",
    )
    examples = len(loader.dataset)
    require(
        delta < 1 / examples, f"delta={delta:g} >= 1/n = {1 / examples:g}: one example published whole satisfies it"
    )
    history: History = [(float(noise), float(rate), int(steps)) for noise, rate, steps in engine.accountant.history]
    for _, rate, _ in history:
        require(
            isclose(rate, loader.sample_rate, rel_tol=1e-9),
            f"the accountant counted sample_rate={rate:g}, the loader draws at {loader.sample_rate:g}: give the pair "
            "that make_private returned, and accumulate no gradients",
        )
    epsilon, accountant, described = _composed(history, delta)
    return EpsilonRecord(
        epsilon=epsilon,
        delta=delta,
        unit="example",
        place="local",
        adversary="server",
        relation="zero-out, public N",
        participation_bound=1,
        rounds=1,
        accountant=accountant,
        event=described,
        noise=_noise(engine, optimizer),
        tuning="excludes tuning",
    )


def _composed(history: History, delta: float) -> tuple[float, str, str]:
    """Epsilon, accountant and event."""
    if not history:
        return 0.0, "nothing released", "no step"
    merged: dict[tuple[float, float], int] = {}
    for noise, rate, steps in history:
        merged[noise, rate] = merged.get((noise, rate), 0) + steps
    parts = [(SampledGaussian(noise, rate, "poisson"), steps) for (noise, rate), steps in merged.items()]
    if len(parts) == 1:
        mechanism, steps = parts[0]
        return *account(mechanism, steps, delta), str(event(mechanism, steps))
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    whole = dp_event.ComposedDpEvent([event(mechanism, steps) for mechanism, steps in parts])
    rdp = RdpAccountant(orders=list(RDP_ORDERS), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    return float(rdp.compose(whole).get_epsilon(delta)), "RDP, orders 2 to 256, dp-accounting", str(whole)


def _counts(engine: PrivacyEngine, optimizer: DPOptimizer) -> bool:
    """Whether what the optimizer calls at every step belongs to the engine's accountant."""
    hook: Any = getattr(optimizer, "step_hook", None)
    return any(cell.cell_contents is engine.accountant for cell in getattr(hook, "__closure__", None) or ())


def _noise(engine: PrivacyEngine, optimizer: DPOptimizer) -> str:
    if engine.secure_mode:
        return "secure: Opacus's secure_mode"
    given = "a generator of the user's" if optimizer.generator is not None else "torch's global generator"
    return f"simulated, from {given}: no guarantee if its state is known"


def _examples(parameter: nn.Parameter) -> int | None:
    """Examples of which a parameter has gradients; None where it has none."""
    found = getattr(parameter, "grad_sample", None)
    parts = [found] if isinstance(found, Tensor) else found or []
    return sum(len(part) for part in parts) or (None if not len(parts) else 0)
