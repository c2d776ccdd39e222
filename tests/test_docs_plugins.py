"""The page of plug-ins: its Python runs as it stands, and its recipes in the frameworks' own calling conventions.

Every block marked `python` stands alone and runs here, in a fresh namespace; fragments of larger programs are marked
`py` and tested with their plug-in. The frameworks themselves cannot be installed beside ours: small stand-ins call the
recipes as the real servers do. What they are after is named at each.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm import plugins
from privfm.checks import CohortTooSmall, InvalidArgument
from privfm.defenses import FoolsGold, Krum, Mean, Median, TrimmedMean
from privfm.plugins import StateDictServer, aggregate_state_dicts

PAGE = Path(__file__).parent.parent / "docs" / "plugins.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", TEXT, re.DOTALL | re.MULTILINE))
BLOCKS = [
    (f"{title}-{k}", block)
    for title, body in SECTIONS.items()
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
]


class ClientsAvgAggregator:
    """Takes what FederatedScope's takes (core/aggregators/clients_avg_aggregator.py)."""

    def __init__(self, model: Any = None, device: str = "cpu", config: Any = None) -> None:
        self.model, self.device, self.cfg = model, device, config


class BaseDefenseMethod:
    """FedML's base class gives None where a method is not written (core/security/defense/defense_base.py)."""

    def defend_before_aggregation(self, raw_client_grad_list: Any, extra_auxiliary_info: Any = None) -> Any:
        pass

    def defend_on_aggregation(
        self, raw_client_grad_list: Any, base_aggregation_func: Any = None, extra_auxiliary_info: Any = None
    ) -> Any:
        pass


class FedMLDefender:
    """Dispatches as FedML's released one: who is not in its lists is not asked (core/security/fedml_defender.py)."""

    _defender_instance: FedMLDefender | None = None

    def __init__(self) -> None:
        self.is_enabled, self.defense_type, self.defender = False, "", None

    @staticmethod
    def get_instance() -> FedMLDefender:
        if FedMLDefender._defender_instance is None:
            FedMLDefender._defender_instance = FedMLDefender()
        return FedMLDefender._defender_instance

    def is_defense_enabled(self) -> bool:
        return self.is_enabled

    def is_defense_on_aggregation(self) -> bool:
        return self.is_enabled and self.defense_type in ["slsgd", "rfa", "geometric_median"]

    def is_defense_before_aggregation(self) -> bool:
        return self.is_enabled and self.defense_type in ["krum", "multikrum", "trimmed_mean"]

    def is_defense_after_aggregation(self) -> bool:
        return self.is_enabled and self.defense_type in ["crfl", "cclip"]

    def defend_before_aggregation(self, raw_client_grad_list: Any, extra_auxiliary_info: Any = None) -> Any:
        if self.is_defense_before_aggregation():
            return self.defender.defend_before_aggregation(raw_client_grad_list, extra_auxiliary_info)
        return raw_client_grad_list

    def defend_on_aggregation(
        self, raw_client_grad_list: Any, base_aggregation_func: Any = None, extra_auxiliary_info: Any = None
    ) -> Any:
        if self.is_defense_on_aggregation():
            return self.defender.defend_on_aggregation(
                raw_client_grad_list, base_aggregation_func, extra_auxiliary_info
            )
        return base_aggregation_func(args=None, raw_grad_list=raw_client_grad_list)

    def defend_after_aggregation(self, global_model: Any) -> Any:
        return (
            self.defender.defend_after_aggregation(global_model)
            if self.is_defense_after_aggregation()
            else global_model
        )


@pytest.fixture(autouse=True)
def frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules by the frameworks' names, with the classes that the recipes import."""
    found = {
        "federatedscope.core.aggregators": {"ClientsAvgAggregator": ClientsAvgAggregator},
        "fedml.core.security.defense.defense_base": {"BaseDefenseMethod": BaseDefenseMethod},
        "fedml.core.security.fedml_defender": {"FedMLDefender": FedMLDefender},
    }
    for name, content in found.items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:k]))
            if module.__name__ not in sys.modules:
                monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(content)
    monkeypatch.setattr(FedMLDefender, "_defender_instance", None)


def ran(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(block, PAGE.name, "exec"), names)
    return names


def recipe(section: str, k: int = 0) -> dict[str, Any]:
    return ran(dict(BLOCKS)[f"{section}-{k}"])


def clients(model: dict[str, Tensor], n: int = 5) -> list[dict[str, Tensor]]:
    """Client k's floats are k + 1 above the model's, counters far above."""
    return [
        OrderedDict((k, v + (client + 1 if v.is_floating_point() else 100)) for k, v in model.items())
        for client in range(n)
    ]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_every_block_runs_alone(block: str) -> None:
    assert ran(block)


def test_the_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^):]+)\)", TEXT)
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        found = PAGE.parent / path if path else PAGE
        assert found.exists(), target
        titles = [
            line.lstrip("# ").lower().replace(" ", "-") for line in found.read_text().splitlines() if line[:1] == "#"
        ]
        assert not heading or heading in titles, target


# OpenFedLLM, as main_sft.py calls it


def openfedllm(names: dict[str, Any], fed_alg: str, spoil: bool = False) -> dict[str, Tensor]:
    """Two rounds of its main loop: all clients' models in one list by id, of which a cohort's are new."""
    fed_args = SimpleNamespace(fed_alg=fed_alg, num_clients=8, sample_clients=6)
    global_dict = {"lora_A.weight": torch.zeros(2, 3), "lora_B.weight": torch.zeros(3, 2)}
    local_dict_list = [dict(global_dict) for _ in range(8)]
    sample_num_list, proxy_dict, opt_proxy_dict, auxiliary = [10] * 8, None, None, (None, [None] * 8)
    for round in range(2):
        clients_this_round = [1, 2, 3, 4, 6, 7]
        for client in clients_this_round:
            local_dict_list[client] = {k: v + 1 + client / 100 for k, v in global_dict.items()}
        if spoil:
            local_dict_list[3] = {k: v * float("nan") for k, v in global_dict.items()}
        global_dict, global_auxiliary = names["global_aggregate"](
            fed_args, global_dict, local_dict_list, sample_num_list,
            clients_this_round, round, proxy_dict=proxy_dict,
            opt_proxy_dict=opt_proxy_dict, auxiliary_info=auxiliary,
        )  # fmt: skip
        assert global_auxiliary is None
    return global_dict


def test_openfedllm_aggregates_the_cohort_of_each_round() -> None:
    names = recipe("OpenFedLLM")
    names["server"].rule = Mean()
    after = openfedllm(names, "fedavg")
    expected = 2 * (1 + (1 + 2 + 3 + 4 + 6 + 7) / 600)  # the others in the list have not trained
    assert torch.allclose(after["lora_A.weight"], torch.full((2, 3), expected))
    assert names["server"].round == 2


def test_openfedllm_goes_on_without_a_client_that_sends_nan() -> None:
    names = recipe("OpenFedLLM")
    after = openfedllm(names, "fedprox", spoil=True)
    assert all(bool(entry.isfinite().all()) for entry in after.values())
    assert 2.0 < float(after["lora_B.weight"].mean()) < 2.2


@pytest.mark.parametrize("fed_alg", ["fedadam", "fedyogi", "fedadagrad", "fedadgrad", "fedavgm", "scaffold", "local0"])
def test_openfedllm_refuses_what_the_rule_would_replace(fed_alg: str) -> None:
    with pytest.raises(ValueError, match="use fedavg or fedprox"):
        openfedllm(recipe("OpenFedLLM"), fed_alg)


def test_openfedllm_draws_secret_cohorts_under_a_plan() -> None:
    names = recipe("OpenFedLLM", 1)
    cohort = names["get_clients_this_round"](SimpleNamespace(num_clients=200, sample_clients=20), 0)
    assert len(set(cohort)) == 20 and set(cohort) <= set(range(200))
    model = {"w": torch.zeros(3)}
    names["server"](model, [model] * 20, ids=cohort)
    assert names["get_clients_this_round"](None, 1) != cohort
    assert names["server"].epsilon == names["plan"].epsilon(1) > 0


# FederatedScope, as Server._perform_federated_aggregation calls it (core/workers/server.py)


def federatedscope(**changed: Any) -> SimpleNamespace:
    config = SimpleNamespace(
        aggregator=SimpleNamespace(robust_rule="fedavg"), asyn=SimpleNamespace(use=False),
        federate=SimpleNamespace(use_ss=False, online_aggr=False), personalization=SimpleNamespace(local_param=[]),
    )  # fmt: skip
    for path, value in changed.items():
        group, _, name = path.partition("__")
        setattr(getattr(config, group), name, value)
    model = network()
    server = SimpleNamespace(model=model, models=[model], aggregators=[], device="cpu", _cfg=config)
    return SimpleNamespace(server=server)


def aggregated(runner: SimpleNamespace, buffer: dict[int, tuple[float, Any]]) -> None:
    """What the server does with a round's messages, and with what comes back."""
    model, aggregator = runner.server.models[0], runner.server.aggregators[0]
    agg_info = {
        "client_feedback": list(buffer.values()), "recover_fun": None,
        "staleness": [(client, 0) for client in buffer],
    }  # fmt: skip
    result = aggregator.aggregate(agg_info)
    merged = model.state_dict().copy()
    merged.update({key: result[key] for key in result})
    model.load_state_dict(merged, strict=False)


def test_federatedscope_aggregates_models_by_client() -> None:
    runner = federatedscope()
    recipe("FederatedScope")["install"](runner, TrimmedMean(1))
    model = runner.server.model
    for round in range(2):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        sent = clients(before, 5)
        sent[4] = {k: v * 1e9 if v.is_floating_point() else v for k, v in sent[4].items()}
        aggregated(runner, {9 - i: (1e9 if i == 4 else 10, own) for i, own in enumerate(sent)})
        for name, entry in model.state_dict().items():
            honest = [own[name] for own in sent[:4]]
            if entry.is_floating_point():
                assert bool((entry >= torch.stack(honest).min(0).values - 1e-4).all()), name
                assert bool((entry <= torch.stack(honest).max(0).values + 1e-4).all()), name
            else:
                assert torch.equal(entry, before[name]), name
        assert runner.server.aggregator.server.round == round + 1
    expected = aggregate_state_dicts(before, sent, TrimmedMean(1), ids=[9, 8, 7, 6, 5]).state
    assert all(torch.equal(model.state_dict()[k], expected[k]) for k in expected)


def test_federatedscope_keeps_what_is_personal() -> None:
    runner = federatedscope(personalization__local_param=["1.", "2.bias"])
    recipe("FederatedScope")["install"](runner, Median())
    before = {k: v.clone() for k, v in runner.server.model.state_dict().items()}
    sent = [{k: v for k, v in own.items() if k in ("0.weight", "0.bias", "2.weight")} for own in clients(before, 3)]
    aggregated(runner, {i + 1: (10, own) for i, own in enumerate(sent)})
    after = runner.server.model.state_dict()
    assert torch.equal(after["2.bias"], before["2.bias"])
    assert torch.allclose(after["0.weight"], before["0.weight"] + 2, atol=1e-6)


def test_federatedscope_never_decodes_what_is_no_tensor() -> None:
    runner = federatedscope()
    recipe("FederatedScope")["install"](runner, Mean())
    sent = clients(runner.server.model.state_dict(), 3)
    sent[0]["0.bias"] = "gASVHAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjARleGl0lIWUUpQu"  # base64 of a pickle
    sent[1]["0.bias"] = [0.0, 0.0, 0.0]
    before = runner.server.model.state_dict()["0.weight"].clone()
    aggregated(runner, {i + 1: (10, own) for i, own in enumerate(sent)})
    assert torch.allclose(runner.server.model.state_dict()["0.weight"], before + 3, atol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"aggregator__robust_rule": "krum"}, {"aggregator__robust_rule": "trimedmean"}, {"asyn__use": True},
        {"federate__use_ss": True}, {"federate__online_aggr": True},
    ],
    ids=str,
)  # fmt: skip
def test_federatedscope_refuses_settings_under_which_no_models_arrive(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"clients send changes|no models of single clients"):
        recipe("FederatedScope")["install"](federatedscope(**setting), Mean())


# FedML, as ServerAggregator calls it (core/alg_frame/server_aggregator.py)


def fedml(model: nn.Module, raw: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """on_before_aggregation, aggregate and on_after_aggregation."""
    defender = FedMLDefender.get_instance()

    def plain_average(args: Any, raw_grad_list: Any) -> dict[str, Tensor]:
        return {"averaged": torch.zeros(1)}

    if defender.is_defense_enabled():
        raw = defender.defend_before_aggregation(raw_client_grad_list=raw, extra_auxiliary_info=model.state_dict())
        after = defender.defend_on_aggregation(
            raw_client_grad_list=raw, base_aggregation_func=plain_average, extra_auxiliary_info=model.state_dict()
        )
        return defender.defend_after_aggregation(after)
    return plain_average(args=None, raw_grad_list=raw)


def test_fedml_asks_the_defense_and_loads_what_it_gives() -> None:
    model = network()
    recipe("FedML")["install"](Krum(1))
    raw = [(59.0, own) for own in clients(model.state_dict(), 5)]
    raw[2] = (1e9, OrderedDict((k, v * float("nan") if v.is_floating_point() else v) for k, v in raw[2][1].items()))
    after = fedml(model, raw)
    assert isinstance(after, OrderedDict)
    expected = aggregate_state_dicts(model.state_dict(), [own for _, own in raw], Krum(1)).state
    assert list(after) == list(model.state_dict())
    assert all(torch.equal(after[k], expected[k]) for k in expected)
    model.load_state_dict(after)


def test_fedml_without_the_last_line_would_average_without_a_word() -> None:
    """The negative control of the stand-in: a defense of a name that the dispatcher does not list."""
    names = recipe("FedML")
    names["install"](Krum(1))
    del FedMLDefender.get_instance().is_defense_on_aggregation
    assert "averaged" in fedml(network(), [(1.0, {})])


def test_fedml_refuses_rules_that_need_ids() -> None:
    model = network()
    recipe("FedML")["install"](FoolsGold())
    with pytest.raises(InvalidArgument, match="FoolsGold remembers clients"):
        fedml(model, [(1.0, own) for own in clients(model.state_dict())])


def test_fedml_ends_the_round_when_too_few_are_left() -> None:
    model = network()
    recipe("FedML")["install"](TrimmedMean(1))
    with pytest.raises(CohortTooSmall, match=r"Left out: client 0 lacks 0\.bias"):
        fedml(model, [(1.0, {}), (1.0, {}), *((1.0, own) for own in clients(model.state_dict()))])


def test_the_table_names_what_is_there() -> None:
    named = set(re.findall(r"`(aggregate_\w+|StateDictServer)`", TEXT))
    assert named == {name for name in plugins.__all__ if name.startswith("aggregate_")} | {StateDictServer.__name__}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(privfm\.plugins\.\w+\.\w+)`", TEXT))))
def test_plug_ins_with_libraries_of_their_own_are_where_the_page_says(name: str) -> None:
    """Read, not imported: their libraries may not be there."""
    place, _, own = name.removeprefix("privfm.plugins.").partition(".")
    folder = Path(plugins.__file__).parent
    files = sorted((folder / place).glob("*.py")) or [folder / f"{place}.py"]
    defined = {node.name for file in files for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
    assert own in defined
