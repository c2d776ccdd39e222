"""Model cards of real runs: valid for Hugging Face, complete on privacy, silent on what is private."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from privfm.attacks import ALIE
from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan, FixedPoint, LocalSampling, Mean, TrimmedMean
from privfm.defenses.channels import PairwiseMasks, Plaintext
from privfm.experiment import ArmSpec, RunConfig, play_run, visibility
from privfm.federation import Adam, Poisson
from privfm.learning import IID, SGD, Digits, ImageClassification, SmallCNN
from privfm.plugins.model_card import CardFacts, model_card, write_model_card
from privfm.reporting import RunFolder, everything_private

SEED = 70_707

CONFIG = RunConfig(
    data=Digits(),
    model=SmallCNN(width=4),
    task=ImageClassification(),
    partition=IID(20),
    training=SGD(0.1),
    rule=Mean(),
    channel=Plaintext(),
    optimizer=Adam(0.01),
    rounds=2,
    cohort=Poisson(0.5),
)
EXAMPLES = DPPlan(1.0, 1.0, sample_rate=0.5, delta=1e-4, unit="example", place="local",
                  local=LocalSampling(8, local_steps=2), max_participations=2)  # fmt: skip

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"channel": PairwiseMasks(20, modulus_bits=40), "transforms": (FixedPoint(10.0, 20),)},
    "examples": {"plan": EXAMPLES, "cohort": None},
    "attacked": {"rule": TrimmedMean(3), "attack": ALIE(1.5, "honest"), "malicious_share": 0.2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real runs of two rounds: over masks, under a plan, attacked."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in ARMS.items():
        play_run(folder / name, ArmSpec(name, name, "", replace(CONFIG, **changes)), SEED)
    return {name: folder / name for name in ARMS}


def changed(run: Path, to: Path, summary: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Path:
    """A copy of a finished run in which something else stands."""
    record = RunFolder(run)
    other = RunFolder.open(to, {**record.config(), **(config or {})}, record.environment())
    for row in record.rows():
        other.append(row)
    other.describe(record.population())
    other.finish({**record.summary(), **(summary or {})})
    return to


def record(**changes: Any) -> dict[str, Any]:
    known = {"epsilon": 1.5, "delta": 1e-5, "unit": "client", "place": "central", "adversary": "released_model",
             "relation": "zero-out, public N", "participation_bound": None, "rounds": 2, "accountant": "PLD",
             "event": "SelfComposed", "noise": "secure: no seed is kept", "tuning": "excludes tuning", "median": None,
             "clients": None}  # fmt: skip
    return {**known, **changes}


@pytest.mark.parametrize("name", ARMS)
def test_hugging_face_reads_the_card(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Loaded again by huggingface_hub: the metadata are what was measured, to the last digit."""
    path = write_model_card(runs[name], visibility, CardFacts(license="apache-2.0", language=("en",)))
    assert path == runs[name] / "model" / "README.md"
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    summary = RunFolder(runs[name]).summary()
    results = {one.metric_type: one.metric_value for one in card.data.eval_results or []}
    assert results == {key: summary["metrics"][key]["value"] for key in ("accuracy", "loss")}
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    assert {"federated-learning", "privfm"} < set(card.data.tags or [])
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict(), "written and read once more"
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == [
        "## Privacy", "## Who learns what", "## Utility", "## Training", "## Attacks and defenses", "## Limits",
    ]  # fmt: skip


def test_a_plan_is_stated_in_full(runs: dict[str, Path]) -> None:
    card = model_card(runs["examples"], visibility)
    (known,) = RunFolder(runs["examples"]).summary()["epsilons"]
    for words in (
        f"epsilon {known['epsilon']:.3g} at delta 1e-4 after 2 rounds",
        "(the largest of 20 clients; the median client:",
        "one example of a client that takes part in at most 2 rounds",
        "against the server, which sees everything",
        "zero-out, public N",
        "PLD, dp-accounting",
        "PoissonSampledDpEvent",
        "Tuning: excludes tuning",
        "**This was a simulation: the noise can be drawn again by whoever knows its seed.**",
        "- simulated-differential-privacy",
        "One example is protected, not everything a client holds",
        "noise_multiplier: 1.0, max_grad_norm: 1.0",
    ):
        assert words in card
    assert "There is no differential privacy" not in card


@pytest.mark.parametrize("name", ["plain", "attacked"])
def test_without_a_plan_it_says_so(runs: dict[str, Path], name: str) -> None:
    card = model_card(runs[name], visibility)
    assert "**There is no differential privacy" in card and "- no-differential-privacy" in card
    assert "epsilon 0" not in card and "Guarantee" not in card and "No guarantee covers these numbers." in card


def test_a_plan_without_noise_is_no_privacy(runs: dict[str, Path], tmp_path: Path) -> None:
    run = changed(runs["examples"], tmp_path / "run", {"epsilons": [record(epsilon=None)]})
    card = model_card(run, visibility)
    assert "**There is no differential privacy" in card and "epsilon is infinite" in card
    assert "- no-differential-privacy" in card


@pytest.mark.parametrize(
    ("records", "tag", "said"),
    [
        ([record()], "- differential-privacy", None),
        ([record(), record(noise="simulated: no guarantee if the seed is known")], "- simulated", "a simulation"),
        ([record(noise="scaled to a population of 9: no guarantee for this run")], "- simulated", "No guarantee holds"),
    ],
    ids=["secure", "one of two seeded", "scaled"],
)
def test_only_noise_without_a_seed_is_tagged_as_a_guarantee(
    runs: dict[str, Path], tmp_path: Path, records: list[Any], tag: str, said: str | None
) -> None:
    card = model_card(changed(runs["examples"], tmp_path / "run", {"epsilons": records}), visibility)
    assert re.search(f"^{tag}", card, re.MULTILINE) and card.count("Guarantee: epsilon 1.5") == len(records)
    assert ("**This was a simulation" in card or "**No guarantee holds" in card) == (said is not None)
    assert said is None or said in card


def test_the_channel_the_attack_and_the_rule_are_there(runs: dict[str, Path]) -> None:
    masked, attacked = (model_card(runs[name], visibility) for name in ("plain", "attacked"))
    assert "server: who took part, and the sum modulo m" in masked and "identities are pinned truly" in masked
    assert "The server read 0 %" in masked and "No attack was played" in masked
    assert "server: every update, and who took part" in attacked and "The server saw every single update." in attacked
    assert "A share of 20 % of the clients was malicious on purpose" in attacked
    assert "ALIE(z=1.5" in attacked and "knowing: mean and deviation of the honest updates" in attacked
    assert "TrimmedMean(f=3)" in attacked


def test_a_rule_stays_where_clients_add_their_own_noise(runs: dict[str, Path], tmp_path: Path) -> None:
    """Only a plan that noises the sum takes the rule's place."""
    for place, replaced in (("local", False), ("central", True)):
        plan = {**RunFolder(runs["examples"]).config()["plan"], "unit": "client", "place": place, "local": None}
        card = model_card(
            changed(runs["attacked"], tmp_path / place, {"epsilons": [record()]}, {"plan": plan}), visibility
        )
        assert ("in whose place the plan released the noisy mean" in card) == replaced


def test_it_says_which_engine_played_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "engine local." in model_card(runs["plain"], visibility)
    flower = changed(runs["plain"], tmp_path / "run", {"engine": "flower, deployment"}, {"engine": "flower"})
    assert "engine flower, deployment." in model_card(flower, visibility)


def test_utility_comes_with_its_number_of_examples(runs: dict[str, Path]) -> None:
    summary = RunFolder(runs["plain"]).summary()
    card = model_card(runs["plain"], visibility)
    assert f"| accuracy | {100 * summary['utility']:.1f} % | {summary['utility_n']:,} |" in card
    assert f"Answering always the same reaches {100 * summary['trivial_utility']:.1f} %" in card
    assert "validation 10 %, test 20 %" in card


@pytest.mark.parametrize("name", ARMS)
def test_nothing_private_is_in_it(runs: dict[str, Path], name: str) -> None:
    """Neither the seed nor any private number of summary and rows, nor a path of this machine."""
    card = model_card(runs[name], visibility)
    whole = RunFolder(runs[name])
    assert str(SEED) not in card and str(runs[name].parent) not in card and "worst_decile" not in card
    numbers = {json.dumps(value) for row in whole.rows() for key, value in row.items()
               if visibility(key) == "private" and isinstance(value, float) and len(json.dumps(value)) > 6}  # fmt: skip
    assert numbers and not any(number in card for number in numbers)


def test_paths_and_markup_do_not_pass(runs: dict[str, Path], tmp_path: Path) -> None:
    data = {"class_path": "TextData", "init_args": {"path": "/home/somebody/secret-trial/sst2", "text": "sentence"}}
    model = {"class_path": "SequenceClassifier", "init_args": {"name": "/home/somebody/models/minilm", "adapter": None}}
    run = changed(
        runs["plain"], tmp_path / "run", {"title": "a\n## Privacy\n<script>epsilon 0.1</script>"},
        {"data": data, "model": model},
    )  # fmt: skip
    card = model_card(run, visibility)
    assert "sst2" in card and "minilm" in card and "somebody" not in card
    assert card.count("\n## Privacy\n") == 1 and "<script>" not in card.partition("\n---\n")[2].replace("\\<", "")
    assert ModelCard(card).data.tags


AUDITED = {
    "claimed": 1.5, "delta": 1e-5, "count": 1000, "included": 500, "canaries": "GhostCanaries", "ratio": 0.5,
    "alarm": "", "bound": {"epsilon": 0.75, "ceiling": 4.0, "confidence": 0.95, "method": "one run", "assumes": ""},
}  # fmt: skip


def test_audits_are_printed_when_the_owner_decides(runs: dict[str, Path], tmp_path: Path) -> None:
    audit = {"class_path": "Audit", "init_args": {}}
    run = changed(runs["examples"], tmp_path / "run", {"audited": AUDITED}, {"audit": audit})
    silent, told = model_card(run, visibility), model_card(run, visibility, audits=True)
    assert "what it found is kept in the record" in silent and "0.75" not in silent
    assert "epsilon is at least 0.75 with 95 % confidence" in told and "claimed: 1.5" in told
    alarm = {**AUDITED, "alarm": "epsilon is at least 2 (95 %), claimed is 1.5"}
    contradicted = changed(runs["examples"], tmp_path / "other", {"audited": alarm}, {"audit": audit})
    assert "**The claim is contradicted: epsilon is at least 2" in model_card(contradicted, visibility, audits=True)
    assert "audit" not in model_card(runs["examples"], visibility).lower()


def test_what_has_no_card_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a run"):
        model_card(tmp_path, visibility)
    with pytest.raises(InvalidArgument, match="visibility hides the plan"):
        model_card(runs["plain"], everything_private)
    record = RunFolder(runs["plain"])
    RunFolder.open(tmp_path / "unfinished", record.config(), record.environment())
    with pytest.raises(InvalidArgument, match="is not finished"):
        model_card(tmp_path / "unfinished", visibility)
    with pytest.raises(InvalidArgument, match="is no folder"):
        write_model_card(runs["plain"], visibility, folder=tmp_path / "nowhere")
