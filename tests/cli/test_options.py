"""Options and configuration files: what is read, what is refused, and jsonargparse's traps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, get_type_hints

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Generator, Tensor

from privfm.cli.explain import classes_in, public_classes
from privfm.cli.options import parser_for
from privfm.cli.run import config_parser, request
from privfm.contracts import Rule
from privfm.defenses import DPPlan, IntegerNoise, Krum, LocalSampling, Mean, PreAggregation, TrimmedMean
from privfm.defenses.channels import Plaintext
from privfm.experiment import RunConfig, resolved
from privfm.federation import Adam, Average, FixedSize
from privfm.learning import IA3, SGD, BitFit, Digits, LoRA, PromptTuning, Schedule, SplitShares


@final
@dataclass(frozen=True)
class Unmixed(PreAggregation):
    """A user's own rule around a rule."""

    rule: Rule

    @property
    def inner(self) -> Rule:
        return self.rule

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        return torch.eye(len(gram), dtype=gram.dtype)


OWN = f"{Unmixed.__module__}.Unmixed"


def read(*argv: str) -> RunConfig:
    return request("run", argv).config


# ------------------------------------------------------------------------------------------------------------ reading


def test_example_is_read(example: str) -> None:
    asked = request("run", [example])
    assert (asked.name, asked.out, asked.seeds) == ("example", Path("runs/example"), (0,))
    assert asked.config.data == Digits()
    assert asked.config.rule == TrimmedMean(f=4)
    assert asked.config.cohort == FixedSize(20)
    assert asked.config.training == SGD(0.05, Schedule(batch_size=8, epochs=2), momentum=0.9)


def test_what_is_left_out_is_federated_averaging_in_the_clear(example: str) -> None:
    config = read(example)
    assert (config.channel, config.optimizer) == (Plaintext(), Average())


def test_command_line_wins_over_the_file_wherever_it_stands(example: str) -> None:
    assert read("--rounds", "3", "--config", example).rounds == 3
    assert read(example, "--rounds", "3").rounds == 3


def test_nested_options_change_one_value(example: str) -> None:
    config = read(example, "--training.schedule.steps", "3", "--rule.f", "5", "--splits.test", "0.3")
    assert config.training == SGD(0.05, Schedule(batch_size=8, epochs=2, steps=3), momentum=0.9)
    assert config.rule == TrimmedMean(f=5)
    assert config.splits == SplitShares(test=0.3)


def test_everything_on_the_command_line() -> None:
    words = "--data Digits --model SmallCNN --task ImageClassification --partition IID --partition.clients 4"
    words += " --training SGD --training.learning_rate 0.1 --rounds 1 --cohort FixedSize --cohort.size 2"
    asked = request("run", [*words.split(), "--seeds", "[1,2]"])
    assert (asked.name, asked.seeds, asked.config.rule) == ("run", (1, 2), Mean())


def test_a_default_leaves_nothing_to_the_class_that_replaces_it(example: str) -> None:
    """jsonargparse keeps parameters that both classes have: Average's learning rate would make Adam diverge."""
    assert read(example, "--optimizer", "Adam").optimizer == Adam()
    assert read(example, "--optimizer.learning_rate", "0.5").optimizer == Average(0.5)


def test_plan_and_lists(example: str, tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text(
        "plan = {noise_multiplier = 1.0, max_grad_norm = 1.0, sample_rate = 0.5, delta = 1e-4}\n"
        '[[transforms]]\nclass_path = "Clip"\ninit_args = {max_grad_norm = 2.0}\n'
    )
    config = read(example, "--config", str(file), "--cohort", "null")
    assert config.plan == DPPlan(1.0, 1.0, 0.5, 1e-4)
    assert [repr(part) for part in config.transforms] == ["Clip(max_grad_norm=2.0)"]


def test_a_flag_needs_no_value(example: str) -> None:
    assert read(example, "--strict").strict
    assert read(example, "--strict", "--rounds", "3").strict
    assert not read(example, "--strict", "false").strict


def test_printed_configuration_reads_as_the_same(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [example, "--rule", OWN, "--rule.rule", "Krum", "--rule.rule.f", "2"]
    with pytest.raises(SystemExit) as leaving:
        request("run", [*words, "--print_config"])
    assert leaving.value.code == 0
    file = tmp_path / "printed.toml"
    file.write_text(capsys.readouterr().out)
    assert read(str(file)) == read(*words)


def test_recorded_configuration_reads_as_the_same(example: str) -> None:
    """What a run's config.json holds is what a configuration file may hold."""
    config = read(example, "--rule", "Krum", "--rule.f", "2")
    parser = config_parser("run")
    found = parser.instantiate(parser.parse_object(resolved(config)))
    assert found.rule == Krum(2)
    assert found.training == config.training


# ------------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "--ruel Krum": "no option 'ruel'; did you mean 'rule'?",
    "--splits.tst 0.3": "no option 'splits.tst'; did you mean 'splits.test'?",
    "--rule Krumm": "rule: 'Krumm' is not known; did you mean 'Krum'? (or give a full import path)",
    "--cohort Poison": "cohort: 'Poison' is not known; did you mean 'Poisson'? (or give a full import path)",
    "--rule.f abc": "rule.f: expected int, got 'abc'",
    "--seeds 3": "seeds: expected a list, written \"[1,2]\", got '3'",
    "--rounds 2.5": "rounds: expected int, got '2.5'",
    "--rule.ff 3": "rule=TrimmedMean: no option 'ff'; did you mean 'f'?",
    "--rule Mean --rule.g 3": "rule=Mean: no option 'g'; Mean takes none",
    "--training.shedule.steps 3": "training=SGD: no option 'shedule'; did you mean 'schedule'?",
    "--training.schedule.stps 3": "training=SGD: no option 'stps'; did you mean 'steps'?",
    "--channel CKKS": "channel=CKKS: missing bound, clients",
    "--plan.delta 0.1": "plan=DPPlan: missing noise_multiplier, max_grad_norm, sample_rate",
    "--attack ALIE --attack.statistics honst": "attack.statistics: expected Literal['own', 'honest'], got 'honst'",
    "--rule nowhere.Rule": "rule=nowhere.Rule: No module named 'nowhere'",
    "--rule collections.OrderedDict": "rule: Import path collections.OrderedDict does not correspond to a subclass",
    "--rule GramRule": "rule: Expected an instantiatable class, but GramRule is abstract; known: AdaptiveClipping",
    "--rule.help Krummm": "rule: 'Krummm' is not known; did you mean 'Krum'?",
    "--cohrt.size 3": "no option 'cohrt.size'; did you mean 'cohort'?",
    "--config --rounds 3": "--config=--rounds: expected a TOML file, got an option",
    "--out=": "out='': expected a folder",
    "--roun 3": "no option 'roun'; did you mean 'rounds'?",
    "extra": "unrecognized arguments: extra",
    "--rule.f -1": "f=-1: expected a whole number >= 0",
    "--rounds 0": "rounds=0: expected a whole number >= 1",
    "--device cuda:99": "device='cuda:99'",
}


@pytest.mark.parametrize("words", WRONG)
def test_one_clear_line(words: str, example: str, refused: Callable[..., str]) -> None:
    if words.startswith("--device") and torch.cuda.is_available():
        words, expected = "--rounds -1", "rounds=-1: expected a whole number >= 1"
    else:
        expected = WRONG[words]
    assert refused("run", example, *words.split()).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rouds = 3", "no option 'rouds'; did you mean 'rounds'?"),
        ("splits = {tst = 0.3}", "no option 'splits.tst'; did you mean 'splits.test'?"),
        ('rule = "Krumm"', "rule: 'Krumm' is not known; did you mean 'Krum'?"),
        ('[rule]\nclass_path = "Krum"\n[rule.init_args]\nff = 3', "rule=Krum: no option 'ff'; did you mean 'f'?"),
        ('[[transforms]]\nclass_path = "Clp"', "transforms: 'Clp' is not known; did you mean 'Clip'?"),
        ('model = {class_path = "SequenceClassifier", init_args = {adapter = {rnk = 3}}}', "model.adapter=LoRA: no "),
        ('[cohrt]\nclass_path = "FixedSize"\n[cohrt.init_args]\nsize = 3', "no option 'cohrt'; did you mean 'cohort'?"),
        ('rule = {class_pth = "Krum"}', "rule: no key 'class_pth'; did you mean 'class_path'?"),
        ('rule = {class_path = "Krum", init_arg = {f = 3}}', "rule: no key 'init_arg'; did you mean 'init_args'?"),
        ('[[transforms]]\nclass_path = "Clip"\ninit = {}', "transforms: no key 'init'; did you mean 'init_args'?"),
        ("rule = 3", "rule: Not a valid subclass of Rule. Got value: 3"),
        ("plan = {noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.3, delta=3.0}", "delta=3.0: expected a"),
    ],
)
def test_mistakes_in_a_file(
    text: str, expected: str, example: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    assert refused("run", example, "--config", str(file)).startswith(expected)


def test_missing_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "demo.toml").touch()
    asked = tmp_path / "dmo.toml"
    assert refused("run", str(asked)) == f"CONFIG={asked} is not a file; did you mean '{tmp_path / 'demo.toml'}'?"
    assert refused("check", "--config") == "CONFIG= is not a file"
    (tmp_path / "folder.toml").mkdir()
    assert "'folder.toml'" not in refused("run", str(tmp_path / "folder.toml"))


def test_syntax_error_names_the_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("rounds = 3\n[rule\n")
    assert refused("run", str(file)).startswith(f"CONFIG={file} is not TOML: ")
    assert "line 2" in refused("run", str(file))


def test_nothing_given(refused: Callable[..., str]) -> None:
    error = refused("run")
    assert error.startswith("missing data, model, task, partition, training")
    assert error.endswith("; give a CONFIG.toml")


def test_the_form_of_a_list_inside_an_option(example: str, refused: Callable[..., str]) -> None:
    words = (example, "--model", "SequenceClassifier")
    error = refused("run", *words, "--model.adapter.modules", '["query","value"]')
    assert error.endswith("""write --model.adapter '{"modules": [...]}'""")
    model = read(*words, "--model.adapter", '{"modules": ["query", "value"]}').model
    assert model.adapter.modules == ("query", "value")  # type: ignore[attr-defined]


def test_each_command_says_what_it_does() -> None:
    assert config_parser("run").description != config_parser("check").description


# -------------------------------------------------------------------------------------------------- classes and names


def test_own_class_by_full_import_path_only(example: str, refused: Callable[..., str]) -> None:
    words = ("--rule.rule", "Krum", "--rule.rule.f", "3")
    assert read(example, "--rule", OWN, *words).rule == Unmixed(Krum(f=3))
    assert refused("run", example, "--rule", "Unmixed", *words).startswith("'Unmixed' is no public class of privfm")


def test_own_class_from_the_working_folder(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizers.py").write_text(
        "from privfm.federation import Average\n"
        "from privfm.contracts import ServerOptimizer\n"
        "class Halved(ServerOptimizer):\n"
        "    def step(self, state, model, update):\n"
        "        return Average(0.5).step(state, model, update)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert type(read(example, "--optimizer", "own_optimizers.Halved").optimizer).__name__ == "Halved"


def test_mistake_inside_a_nested_rule(example: str, refused: Callable[..., str]) -> None:
    words = ("--rule", OWN, "--rule.rule")
    assert refused("run", example, *words, "Krumm").startswith("rule.rule: 'Krumm' is not known; did you mean 'Krum'?")
    assert refused("run", example, *words, "Krum", "--rule.rule.f", "abc") == "rule.rule.f: expected int, got 'abc'"


def test_internal_class_by_full_import_path_only(example: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    """jsonargparse would take it by its short name: noise without a plan that accounts for it."""
    words = ("--rule.noise_multiplier", "1.0", "--rule.sensitivity", "1.0", "--rule.denominator", "2.0")
    assert "'GaussianRelease' is no public" in refused("run", example, "--rule", "GaussianRelease", *words)
    file = tmp_path / "internal.toml"
    fields = "noise_multiplier = 1.0, sensitivity = 1.0, denominator = 2.0"
    file.write_text(f'rule = {{class_path = "GaussianRelease", init_args = {{{fields}}}}}')
    assert "'GaussianRelease' is no public" in refused("run", example, "--config", str(file))
    path = "privfm.defenses.privacy.releases.GaussianRelease"
    assert repr(read(example, "--rule", path, *words).rule).startswith("GaussianRelease(noise_multiplier=1.0, sens")


# ---------------------------------------------------------------------------------------------------- library's traps


def configurable() -> list[type]:
    """Public classes that a run's configuration can name, at any depth."""
    bases = tuple(kind for hint in get_type_hints(RunConfig).values() for kind in classes_in(hint) if kind is not str)
    return [kind for kind in public_classes().values() if issubclass(kind, bases)] + [
        LoRA,
        BitFit,
        IA3,
        PromptTuning,
        LocalSampling,
        IntegerNoise,
        Schedule,
    ]


@pytest.mark.parametrize("kind", configurable(), ids=lambda kind: kind.__name__)
def test_every_option_is_validated(kind: type) -> None:
    assert "Unvalidated" not in parser_for(kind).format_help()


def test_every_option_of_a_run_is_validated() -> None:
    assert "Unvalidated" not in config_parser("run").format_help()


class Unresolvable:
    def __init__(self, f: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        """A type that cannot be found."""


def test_an_unvalidated_option_would_be_seen() -> None:
    assert "Unvalidated" in parser_for(Unresolvable).format_help()


@dataclass(frozen=True)
class Linear:
    steps: int = 1


@dataclass(frozen=True)
class Cosine:
    steps: int = 1
    floor: float = 0.0


def scheduled(schedule: Linear | Cosine = Linear()) -> Any:
    return schedule


def test_a_union_of_dataclasses_picks_the_first_that_fits() -> None:
    """Why everything nameable is a subclass of a small abstract class: jsonargparse never asks which was meant."""
    parser = ArgumentParser(parser_mode="toml", exit_on_error=False)
    parser.add_function_arguments(scheduled, None, as_group=False)
    assert parser.instantiate(parser.parse_args(["--schedule", '{"steps": 3}'])).schedule == Linear(3)


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_parser("run").parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "how updates become one." in told and "share of a cohort that is lost at some stage" in told
