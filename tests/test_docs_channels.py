"""The pages on secure aggregation say of every channel what its code says, and what they show runs."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from privfm import checks
from privfm.checks import InvalidArgument
from privfm.cli import main
from privfm.contracts import Channel, Reveals
from privfm.defenses import DPPlan, FixedPoint, channels
from privfm.defenses.channels import BFV, CKKS, CKKSGram, PairwiseMasks, RLWEPad
from privfm.defenses.channels.pad.parameters import most_bits
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.federation import Arm, problems

ROOT = Path(__file__).parent.parent
THREATS = ROOT / "docs" / "threat_models.md"
PAGE = ROOT / "docs" / "secure_aggregation.md"
TEXT = PAGE.read_text(encoding="utf-8")
PUBLIC = {name: getattr(channels, name) for name in channels.__all__}
CLIENTS, D = 100, 1000


def table(page: Path, columns: int, first: str) -> dict[str, list[str]]:
    """The cells of every row after the first one, by that, of the table that is headed `first` and so wide."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        if len(rows[0]) == columns and rows[0][0] == first:
            return {row[0].strip("`"): row[1:] for row in rows[2:]}
    raise LookupError(f"{page.name} has no table of {columns} columns headed {first!r}")


LEARNS = table(THREATS, 5, "channel")
TOGETHER = table(THREATS, 3, "channel")
CHOICE = table(PAGE, 10, "channel")


def made(expression: str) -> Channel:
    """The channel that the first cell of a row writes down."""
    found = eval(expression, {"__builtins__": {}}, dict(PUBLIC))
    assert isinstance(found, Channel)
    return found


# Who learns what


@pytest.mark.parametrize("expression", LEARNS)
def test_who_learns_what_in_the_words_of_the_code(expression: str) -> None:
    learns = made(expression).learns
    assert LEARNS[expression] == [learns.get(role, "-") for role in ("server", "key holder", "clients", "trust")]
    assert set(learns) <= {"server", "key holder", "clients", "trust"}


@pytest.mark.parametrize("rows", [LEARNS, TOGETHER, CHOICE], ids=["learns", "together", "choice"])
def test_every_public_channel_has_a_row(rows: dict[str, list[str]]) -> None:
    assert {type(made(expression)).__name__ for expression in rows} == set(PUBLIC)


def test_variants_that_learn_otherwise_have_rows_of_their_own() -> None:
    listed = {made(expression) for expression in LEARNS}
    assert {BFV(CLIENTS, 20, holder="apart"), BFV(CLIENTS, 20, holder="blinded"), BFV(CLIENTS, 20, "clients")} <= listed
    assert {CKKS(1.0, CLIENTS, exact_grid=grid, release="clients") for grid in (True, False)} <= listed
    assert {CKKS(1.0, CLIENTS), CKKS(1.0, CLIENTS, exact_grid=False), PairwiseMasks(CLIENTS, active=True)} <= listed
    assert {CKKSGram(1.0), CKKSGram(1.0, gram_to_server=True)} <= listed


def test_what_two_know_together_is_said_of_the_same_channels() -> None:
    assert list(TOGETHER) == list(LEARNS)
    for expression, (_, with_holder) in TOGETHER.items():
        assert (with_holder == "-") == ("key holder" not in made(expression).learns), expression
        assert with_holder == "-" or with_holder.startswith("every row"), expression


# Which channel


def fits(channel: Channel, place: str) -> bool:
    """Whether some plan of that place runs over the channel, or over one of its kind that differs in numbers alone."""
    kinds = [channel]
    if isinstance(channel, CKKS):
        kinds.append(replace(channel, bound=2.0**31))
    if isinstance(channel, RLWEPad):
        kinds.append(replace(channel, approximate=False, bits=11))
    return any(not problems(arm, D, CLIENTS) for kind in kinds for arm in arms(kind, place))


def arms(channel: Channel, place: str) -> Iterator[Arm]:
    base = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.8, delta=1e-3)
    if place == "central":
        plans = [base]
    elif place == "key_holder":
        plans = [replace(base, place="key_holder", source="secure", max_participations=10)]
    elif place == "local":
        plans = [replace(base, place="local", max_participations=10)]
    else:
        shares = [IntegerNoise(10, CLIENTS, resolution=2**r, modulus_bits=m) for r, m in ((16, 32), (10, 20), (3, 12))]
        plans = [replace(base, place="distributed", max_participations=10, integers=each) for each in shares]
    for plan in plans:
        codec = (FixedPoint(1.0, 11),) if channel.integers and plan.integers is None else ()
        yield Arm(channel=channel, plan=plan, transforms=codec)


@pytest.mark.parametrize("expression", CHOICE)
def test_the_choice_is_between_what_the_code_says(expression: str) -> None:
    channel = made(expression)
    server, _, _, _, whole, _, noise, rules, holder = CHOICE[expression]
    assert (whole, holder) == (("no", "yes")[channel.integers], ("no", "yes")[bool(channel.key_holder_stages)])
    assert rules.startswith({Reveals.EACH: "any", Reveals.SUM: "Mean", Reveals.GRAM: "from inner"}[channel.reveals])
    assert ("who took part" in server) is (not channel.server_learns_sum)
    places = ("central", "local", "key_holder", "distributed")
    assert noise.split(", ") == [place for place in places if fits(channel, place)]


def test_bytes_are_those_of_the_code() -> None:
    stated = {expression: float(cells[2]) for expression, cells in CHOICE.items()}
    d = 1_000_000
    for expression, said in stated.items():
        channel = made(expression)
        if isinstance(channel, BFV):
            assert said == pytest.approx(channel.parameters.bytes_a_parameter, abs=0.05)
        elif isinstance(channel, CKKS):  # ciphertexts are compressed, and each a little differently
            assert said == pytest.approx(channel.cost(d).bytes_a_number, rel=0.02)
        elif isinstance(channel, CKKSGram):
            assert said == pytest.approx(float(channel.facts(d, CLIENTS)["bytes a parameter"].split()[0]), rel=0.02)
        else:
            assert said == 4


# Numbers


def test_neighbours_and_thresholds() -> None:
    rows = table(PAGE, 4, "clients")
    heads = re.findall(r"`corrupt=([\d.]+), dropouts=([\d.]+)`", TEXT)
    assert len(heads) == 3 and len(rows) == 4
    for clients, cells in rows.items():
        for (corrupt, dropouts), cell in zip(heads, cells, strict=True):
            graph = PairwiseMasks(int(clients), float(corrupt), float(dropouts)).graph(int(clients))
            assert cell == f"k {graph.neighbours}, t {graph.threshold}"
            assert graph.meets_bounds
    assert (PairwiseMasks(10).corrupt, PairwiseMasks(10).dropouts) == (0.2, 0.05)


def test_head_room() -> None:
    assert "27, 24, 21 bits for 10, 100, 1000 clients at 32 bits" in TEXT
    for clients, bits in ((10, 27), (100, 24), (1000, 21)):
        assert clients * 2**bits < 2**31 <= clients * 2 ** (bits + 1)
    assert "17, 11, 9 bits for 10, 100, 200 clients; `approximate`: 26, 23, 22" in TEXT
    assert [most_bits(n) for n in (10, 100, 200)] == [17, 11, 9]
    assert [most_bits(n, approximate=True) for n in (10, 100, 200)] == [26, 23, 22]
    assert "sums up to 2^53" in TEXT
    assert BFV(clients=2**10, bits=43).largest_coordinate == 2.0**43
    with pytest.raises(InvalidArgument, match="<= 53"):
        BFV(clients=2**10, bits=44)


def test_the_pads_error_and_estimates() -> None:
    (expression,) = [name for name in CHOICE if name.startswith("RLWEPad")]
    pad = made(expression)
    assert isinstance(pad, RLWEPad)
    assert "deviation of 3.2 steps" in CHOICE[expression][3]
    assert pad.parameters.deviation(CLIENTS) == pytest.approx(3.2, abs=0.05)
    facts = pad.facts(D, CLIENTS)["security"]
    assert "177 bits with two honest clients in the sum and 241" in TEXT
    assert "177 bits" in facts and "241 without" in facts


def test_distances_under_encryption() -> None:
    assert "a deviation of 1.6 %, and of 25 % at worst" in TEXT
    assert CKKSGram(1.0).facts(1_000_000, 10)["squared distances"] == "off by 1.6% (one deviation), 25% at worst"


# What the pages show


def test_its_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)


COMMANDS = re.findall(r"```\n(privfm check .*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS, ids=[str(k) for k in range(len(COMMANDS))])
def test_its_command_lines_have_no_problems(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert "no problems; nothing was trained" in capsys.readouterr().out


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("page", [PAGE, THREATS], ids=lambda page: page.stem)
def test_the_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^):]+)\)", text)
    assert targets
    for target in targets:
        name, _, heading = target.partition("#")
        found = page.parent / name if name else page
        titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, target


def test_errors_are_those_that_exist() -> None:
    rows = table(PAGE, 3, "error")
    for name, (parent, _) in rows.items():
        kind = getattr(checks, name)
        assert kind.__bases__[0].__name__ == parent.strip("`"), name
    envelope = {
        name for name, kind in inspect.getmembers(checks, inspect.isclass) if kind.__base__ is checks.BrokenEnvelope
    }
    assert envelope <= set(rows)


def test_names_in_code_exist() -> None:
    """Every option, field and class that stands in backticks on its own."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "privfm").rglob("*.py"))
    for name in re.findall(r"`([A-Za-z_]\w*)(?:[.(=][^`]*)?`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)):
        assert re.search(rf"\b{name}\b", source), name
