"""`privfm doctor`: what is installed, and what works here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import isclose
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, final

from privfm import __version__
from privfm.checks import InvalidArgument
from privfm.cli.errors import DONE, REFUSED, say
from privfm.cli.options import parser_for, values

EPSILON = 4.377178
"""Of one release with sigma 1 at delta 1e-5: Balle and Wang, "Improving the Gaussian mechanism", 2018, theorem 8."""

Verdict = Literal["ok", "missing", "broken"]


@final
@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
      verdict: how it is.
      what: what was looked at.
      detail: a version, a measurement, or why not and what to do.
      needed: privfm does not work without it.
    """

    verdict: Verdict
    what: str
    detail: str
    needed: bool


def doctor(argv: Sequence[str]) -> int:
    """Prints one line for everything that was looked at.

    Args:
      argv: nothing but `--help`.

    Returns:
      1 where something is missing or broken that privfm does not work without.
    """
    values(parser_for(_examine, "privfm doctor", file=False), _examine, argv)
    healthy = True
    for finding in _examine():
        say(f"{finding.verdict:<9}{finding.what:<28}{finding.detail}".rstrip())
        healthy &= finding.verdict == "ok" or not finding.needed
    say("everything that is needed works" if healthy else "something that is needed does not work")
    return DONE if healthy else REFUSED


def _examine() -> Iterator[Finding]:
    """Says what is installed, and what works here."""
    yield from packages()
    yield worked("computation", _torch, needed=True)
    yield worked("encryption", _tenseal, needed=True)
    yield worked("privacy accounting", _accounting, needed=True)
    yield worked("minilm", _minilm, needed=False)
    yield worked("docstrings", _docstrings, needed=False)
    yield worked("cache folder", _cache, needed=False)


def packages() -> Iterator[Finding]:
    """Versions of what privfm's metadata ask for, against them; what serves development only is left out."""
    try:
        requirements = metadata.requires("privfm") or []
    except metadata.PackageNotFoundError:
        yield Finding("missing", "privfm", "not installed; pip install -e . in its folder", needed=True)
        return
    yield Finding("ok", "privfm", __version__, needed=True)
    for text in requirements:
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        if extra is None or extra[1] != "dev":
            yield package(text.partition(";")[0].strip(), None if extra is None else extra[1])


def package(requirement: str, extra: str | None) -> Finding:
    """One requirement, `name[extras]>=version`, against what is installed."""
    name, _, least = requirement.partition(">=")
    name = name.partition("[")[0]
    what = name if extra is None else f"{name} ({extra})"
    remedy = f"pip install {requirement!r}" if extra is None else f"pip install 'privfm[{extra}]'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("missing", what, remedy, needed=extra is None)
    if _numbers(version) < _numbers(least):
        return Finding("broken", what, f"{version}, expected {least} or newer: {remedy}", needed=extra is None)
    return Finding("ok", what, version, needed=extra is None)


def worked(what: str, check: Callable[[], str], needed: bool) -> Finding:
    """The finding of a check that returns a detail or raises."""
    try:
        return Finding("ok", what, check(), needed)
    except (ImportError, InvalidArgument) as reason:  # InvalidArgument names the package that is not there
        return Finding("missing", what, " ".join(str(reason).split()), needed)
    except Exception as reason:  # whatever goes wrong in somebody's installation is what is looked for
        return Finding("broken", what, f"{type(reason).__name__}: {' '.join(str(reason).split())}", needed)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> `(2, 13, 0)`."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _torch() -> str:
    import torch

    gpus = {f"cuda:{k}": torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())}
    for device in ("cpu", *gpus):
        weights = torch.ones(3, requires_grad=True, device=device)
        (weights @ torch.arange(3.0, device=device)).backward()  # type: ignore[no-untyped-call]  # torch's own
        right = weights.grad is not None and weights.grad.tolist() == [0, 1, 2]
        _expect(right, f"a gradient on {device} came out as {weights.grad}")
    devices = ", ".join(["cpu", *(f"{device} ({name})" for device, name in gpus.items())])
    return f"{devices}; {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _tenseal() -> str:
    import tenseal as ts

    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 20, 40])
    context.global_scale = 2.0**20
    total = (ts.ckks_vector(context, [1.0, 2.0]) + ts.ckks_vector(context, [3.0, 4.0])).decrypt()
    _expect(all(abs(got - want) < 0.01 for got, want in zip(total, (4, 6), strict=True)), f"1+3, 2+4 gave {total}")
    return "encrypted, added, decrypted"


def _accounting() -> str:
    from privfm.defenses import DPPlan

    epsilon = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-5).epsilon(after=1)
    _expect(isclose(epsilon, EPSILON, rel_tol=1e-5), f"epsilon {epsilon} for sigma 1 and delta 1e-5, not {EPSILON}")
    return f"epsilon {epsilon:.6f} for sigma 1 and delta 1e-5"


def _minilm() -> str:
    from transformers import AutoConfig

    from privfm.learning.models import resolved

    folder = resolved("minilm")
    width = AutoConfig.from_pretrained(folder, local_files_only=True).hidden_size
    return f"{width} numbers a token, in {folder}"


def _docstrings() -> str:
    from importlib.util import find_spec

    from privfm.learning.docstrings import PACKAGES

    missing = [library for library, folder in PACKAGES.items() if find_spec(folder) is None]
    if missing:
        raise InvalidArgument(f"{', '.join(missing)}: pip install 'privfm[demo]'")
    return f"{len(PACKAGES)} libraries and the standard one"


def _cache() -> str:
    from privfm.learning import docstrings

    folder: Path = docstrings.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()
    return f"{folder} can be written"
