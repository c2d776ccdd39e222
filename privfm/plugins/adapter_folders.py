"""PEFT adapters that lie in folders, as `save_pretrained` writes them: one a client, one for the server.

Only `adapter_model.safetensors` and `adapter_config.json` are read. A `.bin` file is a pickle, and opening one runs
whatever code its sender put there; the way out is on the sender's side: `save_pretrained(folder)` of PEFT since 0.7
writes safetensors, and `safetensors.torch.save_file(torch.load(path, weights_only=True), ...)` converts a file that one
trusts. Clients are read block by block: what is held at once is the global adapter and one block of columns of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from privfm.checks import BrokenCheckpoint, InvalidArgument, require
from privfm.contracts import Rule
from privfm.files import new_folder, read_json
from privfm.plugins.changes import Client, Unusable
from privfm.plugins.loops import LoopResult, StateDictServer

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLES = ("adapter_model.bin", "pytorch_model.bin")
LONGEST = 2**20
"""Bytes of a configuration that is read: PEFT writes some thousand."""

AGREED = (
    "peft_type", "base_model_name_or_path", "revision", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform",
    "layers_pattern", "bias", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights",
)  # fmt: skip
"""Fields of the configuration that say which weights an adapter changes, and by how much."""


def aggregate_adapter_folders(
    global_folder: str | Path,
    client_folders: Sequence[str | Path],
    out: str | Path,
    rule: Rule | StateDictServer,
    *,
    ids: Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    seed: int = 0,
    product: bool = False,
) -> LoopResult:
    """One round on adapter folders; `out` becomes one that `PeftModel.from_pretrained` loads.

    | a client's folder                                       | what becomes of it                                   |
    |---------------------------------------------------------|------------------------------------------------------|
    | no configuration (or one beyond a MiB), or another base,| left out, counted as bad                             |
    | r, alpha, targets                                       |                                                      |
    | only a `.bin` file, no weights, weights cut off         | left out, counted as bad; nothing is unpickled       |
    | other entries or shapes, NaN                            | left out, counted as bad                             |

    Args:
      global_folder: the adapter that clients started from.
      client_folders: theirs after training.
      out: a folder that is not there yet, or empty. It is written whole or not at all, with the global configuration.
      rule: any rule, or a `StateDictServer` that remembers, or holds a plan.
      ids: the clients behind the folders; 0 to n-1 when None.
      weights: `(n,)`, each client's share as the *server* knows it.
      seed: of what random rules draw.
      product: compare clients by the changes they make to the weights, B A - B0 A0, and write the best factors of the
        same rank; a head (`modules_to_save`) is compared as it is. Plain LoRA without patterns. With a server, give it
        `scaling` instead.

    Returns:
      What became of whom; `state` holds the new adapter.

    Raises:
      InvalidArgument: the global folder is incomplete, a folder is given twice, `out` is taken.
      CohortTooSmall, RoundFailed: as `StateDictServer` does; nothing is written then.
    """
    from safetensors.torch import load_file, save_file

    source, folders = Path(global_folder), [Path(folder) for folder in client_folders]
    twice = sorted({str(each) for each in folders if [f.resolve() for f in folders].count(each.resolve()) > 1})
    require(not twice, f"client_folders: {', '.join(twice)} is given twice; a client counts once a round")
    config = _opened(source)
    if isinstance(config, Unusable):
        raise InvalidArgument(f"global_folder {source} {config.reason}")
    server = rule
    if isinstance(server, StateDictServer):
        require(
            not product and seed == 0, "product and seed: a StateDictServer has its own; give it scaling= and seed="
        )
    else:
        server = StateDictServer(server, seed=seed, scaling=_scaling(config) if product else None)
    before = server.state
    try:
        with new_folder(Path(out)) as folder:
            clients = [_client(each, config) for each in folders]
            result = server(load_file(source / WEIGHTS), clients, ids=ids, weights=weights)
            save_file(result.state, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
    except BaseException:
        server.load(before)  # a round that is not on disk was not played
        raise
    return result


def _client(folder: Path, config: Mapping[str, Any]) -> Client:
    """The file with a client's weights, if its configuration is the global one."""
    found = _opened(folder)
    if isinstance(found, Unusable):
        return found
    differ = [name for name in AGREED if _plain(found.get(name)) != _plain(config.get(name))]
    if differ:
        listed = ", ".join(f"{name}={_short(found.get(name))}, not {_short(config.get(name))}" for name in differ)
        return Unusable(f"was trained with {listed}")
    return folder / WEIGHTS


def _opened(folder: Path) -> dict[str, Any] | Unusable:
    """The configuration of a complete folder."""
    if not (folder / WEIGHTS).is_file():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            return Unusable(f"has only {pickles[0]}, a pickle, which is never opened: save it again as {WEIGHTS}, with "
                            "PEFT's save_pretrained or safetensors.torch.save_file")  # fmt: skip
        return Unusable(f"has no {WEIGHTS}")
    try:
        require((folder / CONFIG).stat().st_size <= LONGEST, f"it is longer than {LONGEST:,} bytes")
        config = read_json(folder / CONFIG)
    except (BrokenCheckpoint, InvalidArgument, OSError, RecursionError) as error:  # the last: brackets in brackets
        return Unusable(f"has no readable configuration: {error}")
    if config.get("peft_type") != "LORA":
        return Unusable(f"holds an adapter of type {_short(config.get('peft_type'))}, expected LORA")
    return config


def _short(value: object) -> str:
    """What a client wrote, as far as a reason needs it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _plain(value: object) -> object:
    """A field without what says nothing: PEFT writes sets as lists in any order, and every time that it loads an
    adapter with a head it names the head's modules once more in `modules_to_save`.
    """
    if isinstance(value, list):
        return sorted(set(map(str, value)))
    return value or None


def _scaling(config: Mapping[str, Any]) -> float:
    """Alpha over rank, as the configuration has it.

    Raises:
      InvalidArgument: adapters of several ranks or scalings, or none that are products of two factors.
    """
    odd = [name for name in ("rank_pattern", "alpha_pattern", "use_dora") if config.get(name)]
    require(
        not odd,
        f"product=True and {', '.join(odd)}: one scaling is read for all modules; give a StateDictServer "
        "scaling={module: alpha / rank}, or product=False",
    )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise InvalidArgument(f"r={rank!r}, lora_alpha={alpha!r}: expected a rank of at least 1 and a number")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)
