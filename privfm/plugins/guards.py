"""What must be true of foreign training code before an epsilon may be printed: weights move, and are saved.

Private fine-tuning can look well, loss and epsilon included, and release weights that were never trained: parameters
replaced after the optimizer was made, factors without gradients of their own, checkpoints under names that nobody
loads. Each of these has a check here that raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from privfm.checks import BrokenCheckpoint, InvalidArgument, PrivacyBroken, require

_NAMED = 3
"""Parameters that an error names; the others are counted."""

WRAPPER = "_module."
"""What wrappers of per-example gradients put before every name; an adapter saved under it loads as nothing."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name.

    Raises:
      InvalidArgument: there are none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(found), f"{type(model).__name__} has no parameter that requires a gradient: nothing would be trained")
    return found


def check_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Refuses an optimizer of other parameters than these.

    Args:
      parameters: what is trained, by name.
      optimizer: anything with `param_groups`.

    Raises:
      InvalidArgument: some are missing or foreign.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    missing = [name for name, p in parameters.items() if id(p) not in held]
    require(
        not missing, f"the optimizer does not hold {listed(missing)}: they would never move; freeze them or add them"
    )
    foreign = held - {id(p) for p in parameters.values()}
    require(
        not foreign,
        f"the optimizer holds {len(foreign)} tensors that are no trained parameters of the model: the model was "
        "changed (moved, wrapped, given adapters) after the optimizer was made, or trains more than it shows; make the "
        "optimizer last",
    )


@final
class WeightWatch:
    """Remembers a model as it is: its trained weights must move, and the buffers saved beside them must not.

    Args:
      model: of which parameters that require gradients, and buffers that are saved, are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._now = model, trained_parameters(model)
        self._then = {name: p.detach().clone() for name, p in self._now.items()}
        self._beside = {name: b.detach().cpu().clone() for name, b in _saved_buffers(model).items()}

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Names of the parameters that are what they were."""
        return tuple(name for name, p in self._now.items() if torch.equal(p.detach(), self._then[name]))

    def check(self, noisy: bool) -> None:
        """Refuses weights that stand still, and buffers that do not.

        Args:
          noisy: whether every gradient had noise: then every parameter must have moved; else at least one.

        Raises:
          PrivacyBroken: they have not, or `check_buffers` raises.
        """
        self.check_buffers()
        still = self.unmoved
        if still and (noisy or len(still) == len(self._now)):
            raise PrivacyBroken(
                f"after private steps {listed(still)} of {len(self._now)} trained parameters are what they were: the "
                "optimizer does not see the private gradients, its learning rate is 0, or steps are lost in rounding"
            )

    def check_buffers(self) -> None:
        """Refuses what a model keeps of its examples outside of its weights: statistics, counts, codebooks.

        Raises:
          PrivacyBroken: a buffer that is saved with the weights is not what it was.
        """
        now = _saved_buffers(self._model)
        changed = [
            name
            for name in sorted(now.keys() | self._beside.keys())
            if name not in now or name not in self._beside or not torch.equal(now[name].cpu(), self._beside[name])
        ]
        if changed:
            raise PrivacyBroken(
                f"{listed(changed)}: buffers that changed while the model was trained, are saved with it, and have no "
                "noise; keep no statistics of private examples (eval mode, track_running_stats=False, persistent=False)"
            )


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds, by name."""
    return {
        f"{place}.{name}" if place else name: buffer
        for place, part in model.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def check_saved(model: nn.Module, folder: Path) -> None:
    """Looks into the safetensors files of a folder for every trained value of a model.

    A name may differ from the model's own (PEFT leaves the adapter's name out); the values may not.

    Args:
      model: what was saved; call it right after saving.
      folder: of `save_pretrained` or of a checkpoint.

    Raises:
      BrokenCheckpoint: there is no such file, a trained parameter is not in them, or names are a wrapper's.
    """
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BrokenCheckpoint(f"{folder} holds no .safetensors file: the weights were not saved")
    saved: dict[str, Tensor] = {}
    for file in files:
        saved |= load_file(str(file))
    wrapped = [name for name in saved if name.startswith(WRAPPER) or f".{WRAPPER}" in name]
    if wrapped:
        raise BrokenCheckpoint(
            f"{folder}: {listed(wrapped)} stand under the names of a wrapper, which no model loads; save the model "
            "inside it (Opacus: wrap_model=False)"
        )
    lost = [name for name, p in trained_parameters(model).items() if not _stands(name, p.detach().cpu(), saved)]
    if lost:
        raise BrokenCheckpoint(f"{folder} does not hold the trained values of {listed(lost)}")


def check_reloaded(model: nn.Module, reloaded: nn.Module) -> None:
    """Compares a model with what was loaded from its files, parameter by parameter.

    Args:
      model: the trained one.
      reloaded: a fresh model, loaded from what was saved; names are the same.

    Raises:
      BrokenCheckpoint: a trained parameter is missing or has other values.
    """
    there = dict(reloaded.named_parameters())
    wrong = [
        name
        for name, p in trained_parameters(model).items()
        if name not in there or not torch.equal(p.detach().cpu(), there[name].detach().cpu())
    ]
    if wrong:
        raise BrokenCheckpoint(f"loaded again, {listed(wrong)} are missing or have other values than were trained")


def _stands(name: str, value: Tensor, saved: Mapping[str, Tensor]) -> bool:
    own = saved.get(name)
    candidates: Iterable[Tensor] = saved.values() if own is None else (own,)
    return any(one.shape == value.shape and torch.equal(one, value.to(one.dtype)) for one in candidates)


def listed(names: Iterable[str]) -> str:
    """The first three names and how many more there are.

    >>> listed("abcde")
    'a, b, c and 2 others'
    """
    known = list(names)
    more = len(known) - _NAMED
    return ", ".join(known[:_NAMED]) + (f" and {more} other{'s' * (more > 1)}" if more > 0 else "")


def refuse(problems: Iterable[str]) -> None:
    """Raises one `InvalidArgument` that lists all problems; nothing where there are none."""
    found = list(problems)
    if found:
        raise InvalidArgument("; ".join(found))
