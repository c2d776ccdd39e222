"""`privfm flower-app` and `privfm flower-identity`: a run on the hosts of a real federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from privfm.checks import InvalidArgument, require
from privfm.cli.errors import DONE, say
from privfm.cli.flower_entry import spec_of
from privfm.cli.options import parser_for, values
from privfm.cli.run import request
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses.channels.identity_files import make_secrets, write_public
from privfm.engines.flower.app import MODULE, PUBLIC, Place, write_app
from privfm.engines.flower.node import hosted_here
from privfm.experiment import ArmSpec, RunConfig, arm_of, deal
from privfm.experiment.flower import APP, hosts_of, record_of
from privfm.experiment.run import prepare
from privfm.federation import problems_elsewhere, refuse, refuse_problems
from privfm.files import writable


def flower_app(argv: Sequence[str]) -> int:
    """Writes an app's folder and says what is to be done with it.

    Args:
      argv: `DIR [CONFIG.toml] [--key value ...]`, as for `privfm run`.
    """
    words = list(argv)
    named = bool(words) and not words[0].startswith("-")
    require(named or "--help" in words, "DIR is missing: privfm flower-app DIR CONFIG.toml [--key value ...]")
    folder = Path(words.pop(0)) if named else Path()
    asked = request("flower-app", words)
    require(len(asked.seeds) == 1, f"seeds={list(asked.seeds)}: an app plays one run; give one, or write several apps")
    settings = replace(asked.config.flower, mode="deployment")  # what the record will say of these hosts
    config, seed = replace(asked.config, engine="flower", flower=settings), asked.seeds[0]
    _refuse_seeded(config)
    federation = prepare(config, seed)
    refuse_problems(federation)
    refuse(problems_elsewhere(federation.arm, bool(config.clients_elsewhere)))
    spec = ArmSpec(asked.name, asked.name, "", config)
    place = Place(str(asked.out / f"seed-{seed}"), seed, "server.json")
    with writable(folder):
        write_app(folder, APP, record_of(spec, seed), {}, place)
    say(f"app: {folder}")
    places = hosts_of(config, federation.arm)
    for number in range(places):
        parties = hosted_here(number, places, federation.arm, federation.parties)
        say(f"host {number} of {places}: {_whom(parties)}")
    for line in _NEXT:
        say(line.format(folder=folder, public=folder / MODULE / PUBLIC))
    return DONE


_NEXT = (
    "next, with the folder on every host: `privfm flower-identity {folder} HOST` there (HOST: a number, or `server`)",
    "then all public files into {public}, and the folder to every host again",
    "see docs/flower_deployment.md: SuperLink, SuperNodes, `flwr run {folder}`",
)


def _refuse_seeded(config: RunConfig) -> None:
    """Raises `InvalidArgument` where noise could be taken off again: an app tells every host, and the server, the seed.

    A plan and its epsilon mean nothing then; on one machine they are those of a simulation, and say so.
    """
    plan = config.plan
    seeded = plan is not None and plan.source == "seeded" and plan.noise_multiplier > 0
    require(
        not seeded,
        "plan.source='seeded': every host and the server know an app's seed, and could draw the noise again and take "
        "it off; use --plan.source secure",
    )


def _whom(parties: Sequence[int]) -> str:
    if tuple(parties) == (KEY_HOLDER,):
        return "the key holder"
    shown = ", ".join(str(party) for party in parties[:8])
    return f"{len(parties)} client(s): {shown}{', ...' if len(parties) > len(parties[:8]) else ''}"


def flower_identity(argv: Sequence[str]) -> int:
    """Makes a host's secrets, and the file with their public halves.

    Args:
      argv: `APP HOST [--out FILE]`.
    """
    return int(_identity(**values(parser_for(_identity, "privfm flower-identity", file=False), _identity, argv)))


def _identity(app: Path, host: str, out: Path | None = None) -> int:
    """Makes the secrets of one host, which stay there, and the file with their public halves, which everybody gets.

    Args:
      app: the app's folder, as `privfm flower-app` wrote it.
      host: its number, as `privfm flower-app` said, or `server`.
      out: file of the secrets, by default host-NUMBER.json or server.json here; the public file lies beside it.
    """
    package = app / MODULE
    require(package.is_dir(), f"APP={app} is no folder that privfm flower-app wrote")
    spec = spec_of(package)
    if host == "server":
        parties: Sequence[int] = (SERVER,)
    else:
        parties = _hosted(spec, package, host)
    secrets = Path("server.json" if host == "server" else f"host-{host}.json") if out is None else out
    public = secrets.with_suffix(".public.json")
    require(not public.exists(), f"{public} is there already; choose another --out")
    with writable(secrets):
        write_public(public, make_secrets(secrets, parties))
    say(f"secrets: {secrets} (stay here)")
    say(f"public: {public} (to everybody)")
    return DONE


def _hosted(spec: ArmSpec, package: Path, host: str) -> tuple[int, ...]:
    if not host.isdecimal():
        raise InvalidArgument(f"HOST={host!r}: expected a host's number, or server")
    config, seed = spec.config, Place.read(package.parent).seed
    clients = config.clients_elsewhere or len(deal(config, seed).clients)
    arm = arm_of(config, clients, seed)
    audited = 0 if config.audit is None else config.audit.canaries.count
    return hosted_here(int(host), hosts_of(config, arm), arm, clients + audited)
