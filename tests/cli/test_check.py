"""`privfm check`: what a configuration would do, cost and leak, and what fits together."""

import json
import re
from collections.abc import Callable
from inspect import isabstract
from pathlib import Path

import pytest
import torch

from privfm.cli import main
from privfm.cli.check import LARGEST_MEASURED, compatibility_table, measured_bytes, sample
from privfm.cli.explain import public_classes
from privfm.contracts import Channel, Rule
from privfm.defenses import Clip, DPPlan, Krum, Mean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.defenses.channels.plaintext import packed
from privfm.federation import Arm, FixedSize

PLAN = ["--plan.noise_multiplier", "1", "--plan.max_grad_norm", "1", "--plan.sample_rate", "0.2"]


def checked(capsys: pytest.CaptureFixture[str], status: int, *argv: str) -> dict[str, str]:
    """What the command prints, by the name at the beginning of a line."""
    assert main(["check", *argv]) == status
    lines = capsys.readouterr().out.splitlines()
    pairs = (re.match(r"(problem|instead|[\w' ]+?)(?:: | {2,}| (?=[\d(]))(.+)", line) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


def test_a_good_configuration(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, 0, example)
    assert found["trained values"] == "6,186"
    assert found["clients"] == "40, of them malicious: 4"
    assert found["cohort"] == "20 expected, 20 at most, a round; 10 rounds"
    assert found["smallest cohort"].startswith("9 (2f+1) usable updates for TrimmedMean")
    assert found["server's memory"].startswith("495 kB at most: every update of a cohort (20 x 6,186 x 4 bytes)")
    assert found["server sees"] == "every update, and who took part"
    assert found["in the clear"] == "100.0% of each update"
    assert found["trusted"] == "the server"
    assert found["key holder sees"] == "nothing: there is none"
    assert found["epsilon"].startswith("none. Without a plan")


def test_nothing_is_written_or_trained(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("privfm.learning.training.SGD.run", trained)
    monkeypatch.chdir(tmp_path)
    checked(capsys, 0, example, "--out", "runs/x")
    assert list(tmp_path.iterdir()) == []


def test_private_and_encrypted(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rule", "Mean", "--cohort", "null", *PLAN, "--plan.delta", "1e-3"]
    words += ["--channel", "CKKS", "--channel.bound", "1", "--channel.clients", "40"]
    found = checked(capsys, 0, example, *words)
    epsilon = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.2, delta=1e-3).epsilon(10)
    assert found["privacy after all rounds"].startswith(f"epsilon {epsilon:.3g} at delta 1e-3 after 10 rounds")
    assert found["server sees"] == "ciphertexts, who took part, and the sum, before any noise"
    assert found["key holder sees"] == "the sum, and how many took part, before any noise"
    assert found["in the clear"] == "0.0% of each update"
    assert found["trusted"].endswith("follow the protocol and do not collude")
    assert found["smallest cohort"].startswith("0: under the plan")
    assert found["server's memory"].endswith("one running sum, whatever the cohort")
    assert found["mind"].startswith("over CKKS nobody can make a malicious client clip")


def test_an_audit_s_cost_and_limit(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    private = ["--rule", "Mean", "--cohort", "null", *PLAN, "--plan.delta", "1e-3", "--attack", "null"]
    private += ["--malicious_share", "0", "--transforms", "[]"]
    plain = checked(capsys, 0, example, *private)
    found = checked(capsys, 0, example, *private, "--audit.canaries", "GhostCanaries", "--audit.canaries.count", "1000")
    assert found["audit"] == (
        "1,000 GhostCanaries, about 100 in a round; 1,000 columns more in every update, no accuracy; with every guess "
        "right they would certify epsilon 5.81 at 95%, and no more"
    )
    sent = [int(text["bytes up"].partition("(")[2].partition(")")[0].replace(",", "")) for text in (plain, found)]
    assert sent[1] - sent[0] == 4 * 1000


def test_noise_of_zero_guarantees_nothing(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rule", "Mean", "--cohort", "null", *PLAN, "--plan.delta", "1e-3", "--plan.noise_multiplier", "0"]
    assert checked(capsys, 0, example, *words)["epsilon"].startswith("infinite.")


def test_more_malicious_clients_than_the_rule_tolerates(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, 0, example, "--malicious_share", "0.9")
    assert found["attackers"].startswith("about 18 of 20 are malicious, TrimmedMean tolerates 4: more than that with")
    assert "probability 1 in a round, 1 in" in found["attackers"]
    some = checked(capsys, 0, example, "--malicious_share", "0.2")["attackers"]  # 8 of 40, 20 drawn: 4 on average
    stated = FixedSize(20).exceeds(4, 8, 40)
    assert f"probability {stated:.2g} in a round, {1 - (1 - stated) ** 10:.2g} in one or more of 10" in some
    words = ["--malicious_share", "0.9", "--rule", "Mean"]
    assert "attackers" not in checked(capsys, 0, example, *words)  # tolerates nothing


def test_all_problems_with_their_ways_out(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--channel", "CKKS", "--channel.bound", "1", "--channel.clients", "10", "--malicious_share", "0"]
    assert main(["check", example, *words, *PLAN, "--plan.delta", "0.5"]) == 1
    out = capsys.readouterr().out
    problems = re.findall(r"^problem: (.+)\ninstead: (.+)$", out, re.MULTILINE)
    assert [what.split()[0] for what, _ in problems] == [
        "TrimmedMean",
        "CKKS",
        "delta=0.5",
        "the",
        "TrimmedMean",
        "SignFlip(scale=4.0)",
    ]
    assert "6 problem(s): this must not run" in out
    assert "bytes up" not in out


def test_data_and_model_that_do_not_fit(example: str, refused: Callable[..., str]) -> None:
    assert refused("check", example, "--partition.clients", "4000").startswith("clients=4000")
    assert refused("check", example, "--cohort", "null").startswith("cohort=None")


# -------------------------------------------------------------------------------------------------------------- bytes


def test_measured_bytes_are_those_of_a_run(
    private_words: list[str], private_experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (private_experiment / "example" / "seed-0" / "rounds.jsonl").read_text().splitlines()
    played = json.loads(lines[0])
    found = checked(capsys, 0, *private_words[1:])
    assert f"({played['bytes_up_per_client']:,.0f}) a client" in found["bytes up"]
    assert f"({played['bytes_down_per_client']:,.0f}) a client" in found["bytes down"]


def test_long_rows_are_scaled_up() -> None:
    d = 3 * LARGEST_MEASURED
    up, down, exact = measured_bytes(Arm(cohort=FixedSize(2)), d)
    assert not exact
    assert up == pytest.approx(4 * d, rel=1e-4)
    assert down == pytest.approx(4 * d, rel=1e-4)


def test_encrypted_bytes_come_from_the_protocol_even_where_two_clients_are_too_few() -> None:
    few = CKKS(bound=1.0, clients=50, smallest_release=10)
    up, down, exact = measured_bytes(Arm(cohort=FixedSize(20), channel=few, transforms=(Clip(1.0),)), 3000)
    numbers = few.parameters.numbers
    assert exact
    assert up > -(-3000 // numbers) * numbers * 8  # two ring elements of more than 32 bits a number
    assert down > 4 * 3000  # keys come on top of the model


def test_plain_bytes_are_exact() -> None:
    from privfm.contracts import Encoded

    arm = Arm(cohort=FixedSize(5), rule=Krum(1), channel=Plaintext())
    envelope = 109 + 8 + 32  # header, length of the one part, code
    assert measured_bytes(arm, 77)[0] == envelope + len(packed(Encoded(torch.zeros(1, 77), {})))


# -------------------------------------------------------------------------------------------------------------- table


def test_whole_table_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    found = {tuple(line[:3]): line[3] for line in lines[1:]}
    public = [kind for kind in public_classes().values() if not isabstract(kind)]
    rules = [kind.__name__ for kind in public if issubclass(kind, Rule)]
    channels = [kind.__name__ for kind in public if issubclass(kind, Channel)]
    assert set(found) == {(rule, way, plan) for rule in rules for way in channels for plan in ("none", "central")}
    assert found["Mean", "CKKS", "central"] == "runs"
    assert found["Krum", "Plaintext", "none"] == "runs"
    assert found["Krum", "CKKS", "none"] == "Krum needs GRAM, CKKS reveals only SUM"
    assert "no bounded sensitivity" in found["TrimmedMean", "Plaintext", "central"]
    assert compatibility_table().count("\n") == len(found)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in public_classes().values() if issubclass(kind, Rule | Channel) and not isabstract(kind)],
    ids=lambda kind: kind.__name__,
)
def test_every_public_rule_and_channel_can_be_made(kind: type) -> None:
    assert isinstance(sample(kind), kind)


def test_a_field_without_a_sample_says_where_to_add_one() -> None:
    with pytest.raises(ValueError, match=r"DPPlan needs noise_multiplier, .* SAMPLES in privfm.cli.check"):
        sample(DPPlan)
    assert sample(Mean) == Mean()
