"""Adapter folders as PEFT writes them: what is aggregated loads again, and what does not belong is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from transformers import BertConfig, BertForSequenceClassification

from privfm.checks import CohortTooSmall, InvalidArgument
from privfm.defenses import CenteredClipping, DPPlan, Mean, MultiKrum, TrimmedMean, aggregate_adapters
from privfm.plugins import StateDictServer, aggregate_adapter_folders

CONFIG = BertConfig(
    vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16, num_labels=3, initializer_range=0.5,
)  # fmt: skip
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
WEIGHTS, CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"


def backbone() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(CONFIG)


def trained(received: Path, folder: Path, seed: int, steps: int = 2) -> Path:
    """A client: loads the adapter that it received, trains it, saves it."""
    model = PeftModel.from_pretrained(backbone(), received, is_trainable=True)
    generator = Generator().manual_seed(seed)
    tokens = torch.randint(32, (8, 6), generator=generator)
    labels = torch.randint(3, (8,), generator=generator)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The server's adapter, one round into training, and those of five clients."""
    root = tmp_path_factory.mktemp("federation")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(backbone(), LoraConfig(**LORA)).save_pretrained(root / "first")
    trained(root / "first", root / "global", seed=99)
    return root / "global", [trained(root / "global", root / f"client-{i}", seed=i) for i in range(5)]


@pytest.fixture
def cohort(federation: tuple[Path, list[Path]], tmp_path: Path) -> tuple[Path, list[Path], Path]:
    """Copies that a test may spoil, and where the result goes."""
    received, clients = federation
    shutil.copytree(received, tmp_path / "global")
    own = [Path(shutil.copytree(each, tmp_path / each.name)) for each in clients]
    return tmp_path / "global", own, tmp_path / "out"


def change_config(folder: Path, **fields: object) -> None:
    path = folder / CONFIGURATION
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(backbone(), folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


def dense(adapter: dict[str, Tensor]) -> Tensor:
    """The change of both adapted weights, `3 B A`, in one vector."""
    names = sorted(name for name in adapter if "lora_A" in name)
    return torch.cat([(3 * adapter[n.replace("lora_A", "lora_B")] @ adapter[n]).flatten() for n in names]).double()


def test_the_mean_of_folders_is_the_mean_of_their_entries_and_loads_again(cohort):
    received, clients, out = cohort
    result = aggregate_adapter_folders(received, clients, out, Mean())
    own, written = [load_file(each / WEIGHTS) for each in clients], load_file(out / WEIGHTS)
    assert any("classifier" in name for name in written), "the head is part of the update"
    for name, entry in written.items():
        assert torch.allclose(entry, torch.stack([each[name] for each in own]).mean(0), atol=1e-6), name
        assert torch.equal(entry, result.state[name])
    loaded = PeftModel.from_pretrained(backbone(), out).state_dict()
    for name, entry in written.items():
        inside = [k for k in loaded if k.replace(".default", "").replace(".modules_to_save", "") == name]
        assert any(torch.equal(loaded[k], entry) for k in inside), name
    assert (out / CONFIGURATION).read_bytes() == (received / CONFIGURATION).read_bytes()
    assert not torch.equal(logits(out), logits(received))
    assert {path.name for path in out.iterdir()} == {WEIGHTS, CONFIGURATION}


def test_rules_see_changes_as_the_aggregator_of_state_dicts_does(cohort):
    received, clients, out = cohort
    result = aggregate_adapter_folders(received, clients, out, MultiKrum(1), ids=[4, 3, 2, 1, 0])
    expected = StateDictServer(MultiKrum(1))(
        load_file(received / WEIGHTS), [load_file(each / WEIGHTS) for each in clients], ids=[4, 3, 2, 1, 0]
    )
    assert all(torch.equal(result.state[name], expected.state[name]) for name in expected.state)
    assert torch.equal(result.kept, expected.kept)


def test_products_are_averaged_where_factors_are_not(cohort):
    """The oracle: the mean of the dense changes, and its best approximation of rank 2 by numpy's own SVD."""
    received, clients, out = cohort
    result = aggregate_adapter_folders(received, clients, out, Mean(), product=True)
    target = torch.stack([dense(load_file(each / WEIGHTS)) for each in clients]).mean(0).view(2, 8, 8)
    best = []
    for matrix in target:
        u, s, vh = torch.linalg.svd(matrix)
        best.append((u[:, :2] * s[:2]) @ vh[:2])
    assert torch.allclose(dense(result.state), torch.stack(best).flatten(), atol=1e-6)
    factors = aggregate_adapter_folders(received, clients, out.with_name("factors"), Mean())
    assert (dense(factors.state) - target.flatten()).norm() > (dense(result.state) - target.flatten()).norm()
    start = load_file(received / WEIGHTS)
    by_hand = aggregate_adapters(Mean(), [load_file(each / WEIGHTS) for each in clients], start, scaling=3.0)
    for name, entry in by_hand.factors.items():
        assert torch.allclose(result.state[name], entry, atol=1e-5), name
    assert result.dropped == pytest.approx(by_hand.dropped, rel=1e-3)
    assert 0 < result.dropped < 1
    logits(out)


def test_clients_in_another_gauge_are_the_same_to_products(cohort):
    """`(B / 4) (4 A)` is the same model; its factors are far away."""
    received, clients, out = cohort
    plain = aggregate_adapter_folders(received, clients, out, Mean(), product=True)
    for each in clients[1:3]:
        adapter = load_file(each / WEIGHTS)
        factor = {name: 4.0 if "lora_A" in name else 0.25 if "lora_B" in name else 1.0 for name in adapter}
        save_file({name: entry * factor[name] for name, entry in adapter.items()}, each / WEIGHTS)
    shifted = aggregate_adapter_folders(received, clients, out.with_name("shifted"), Mean(), product=True)
    assert all(torch.allclose(plain.state[name], shifted.state[name], atol=1e-5) for name in plain.state)
    factors = aggregate_adapter_folders(received, clients, out.with_name("factors"), Mean())
    assert not torch.allclose(dense(factors.state), dense(shifted.state), atol=1e-3)


def spoiled(folder: Path, how: str) -> None:
    if how == "another rank":
        change_config(folder, r=4)
    elif how == "another alpha":
        change_config(folder, lora_alpha=60)
    elif how == "other modules":
        change_config(folder, target_modules=["query", "key"])
    elif how == "another base":
        change_config(folder, base_model_name_or_path="elsewhere/model")
    elif how == "rank-stabilised":
        change_config(folder, use_rslora=True)
    elif how == "no LoRA":
        change_config(folder, peft_type="IA3")
    elif how == "no configuration":
        (folder / CONFIGURATION).unlink()
    elif how == "no JSON":
        (folder / CONFIGURATION).write_text("[1")
    elif how == "brackets in brackets":
        (folder / CONFIGURATION).write_text("[" * 200_000)
    elif how == "an endless configuration":
        change_config(folder, notes="x" * 2**20)
    elif how == "an endless name":
        change_config(folder, base_model_name_or_path="x" * 100_000)
    elif how == "no weights":
        (folder / WEIGHTS).unlink()
    elif how == "a pickle":
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    elif how == "cut off":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    elif how == "gone":
        shutil.rmtree(folder)
    else:
        adapter = load_file(folder / WEIGHTS)
        name = min(adapter)
        if how == "NaN":
            adapter[name] = adapter[name] * float("nan")
        elif how == "an entry is missing":
            del adapter[name]
        elif how == "a foreign entry":
            adapter["backdoor"] = torch.ones(1)
        elif how == "another shape":
            adapter[name] = adapter[name].T.contiguous()
        save_file(adapter, folder / WEIGHTS)


REASONS = {
    "another rank": "r=4, not 2", "another alpha": "lora_alpha=60, not 6", "other modules": "target_modules",
    "another base": "elsewhere/model", "rank-stabilised": "use_rslora", "no LoRA": "type 'IA3'",
    "no configuration": "no readable configuration", "no JSON": "no readable configuration",
    "brackets in brackets": "no readable configuration", "an endless configuration": "longer than 1,048,576 bytes",
    "an endless name": "base_model_name_or_path='xxx",
    "no weights": f"has no {WEIGHTS}", "a pickle": "a pickle, which is never opened: save it again as",
    "cut off": "cannot be read", "gone": f"has no {WEIGHTS}", "NaN": "not finite", "an entry is missing": "lacks",
    "a foreign entry": "adds backdoor", "another shape": "has shape",
}  # fmt: skip


@pytest.mark.parametrize("product", [False, True], ids=["factors", "products"])
@pytest.mark.parametrize("how", REASONS)
def test_what_does_not_belong_is_left_out(cohort, how, product):
    received, clients, out = cohort
    spoiled(clients[3], how)
    result = aggregate_adapter_folders(received, clients, out, TrimmedMean(1), product=product)
    assert list(result.left_out) == [3]
    assert REASONS[how] in result.left_out[3]
    assert len(result.left_out[3]) < 1000, "a client does not fill the log"
    others = [each for i, each in enumerate(clients) if i != 3]
    expected = aggregate_adapter_folders(received, others, out.with_name("others"), TrimmedMean(0), product=product)
    assert all(torch.equal(result.state[name], expected.state[name]) for name in expected.state), "f fell by one"


def test_modules_in_another_order_are_the_same(cohort):
    received, clients, out = cohort
    change_config(clients[0], target_modules=["value", "query"])
    change_config(clients[1], target_modules=["query", "value"], inference_mode=False)
    assert aggregate_adapter_folders(received, clients, out, Mean()).bad == 0


@pytest.mark.parametrize("how", ["no weights", "a pickle", "no configuration", "no LoRA", "gone"])
def test_an_incomplete_global_folder_is_refused(cohort, how):
    received, clients, out = cohort
    spoiled(received, how)
    with pytest.raises(InvalidArgument, match="global_folder"):
        aggregate_adapter_folders(received, clients, out, Mean())
    assert not out.exists()


def test_a_round_that_fails_writes_nothing_and_is_forgotten(cohort):
    received, clients, out = cohort
    server = StateDictServer(CenteredClipping(radius=0.1))
    for each in clients:
        spoiled(each, "NaN")
    with pytest.raises(CohortTooSmall, match="client 0 holds values that are not finite"):
        aggregate_adapter_folders(received, clients, out, server)
    assert [path.name for path in out.parent.iterdir() if "out" in path.name] == []
    assert server.round == 0


def test_a_taken_folder_is_refused_and_the_round_is_forgotten(cohort):
    received, clients, out = cohort
    server = StateDictServer(CenteredClipping(radius=0.1))
    for taken in (received, clients[0]):
        before = (taken / WEIGHTS).read_bytes()
        with pytest.raises(InvalidArgument, match="not an empty folder"):
            aggregate_adapter_folders(received, clients, taken, server)
        assert (taken / WEIGHTS).read_bytes() == before
    assert server.round == 0
    aggregate_adapter_folders(received, clients, out, server)
    assert server.round == 1


def test_other_refusals(cohort):
    received, clients, out = cohort
    with pytest.raises(InvalidArgument, match="given twice"):
        aggregate_adapter_folders(received, [*clients, clients[0].parent / "." / clients[0].name], out, Mean())
    with pytest.raises(InvalidArgument, match="a StateDictServer has its own"):
        aggregate_adapter_folders(received, clients, out, StateDictServer(), product=True)
    for each in (received, *clients):
        change_config(each, alpha_pattern={"query": 12})
    with pytest.raises(InvalidArgument, match="one scaling is read for all modules"):
        aggregate_adapter_folders(received, clients, out, Mean(), product=True)
    for each in (received, *clients):
        change_config(each, alpha_pattern={}, r="2")
    with pytest.raises(InvalidArgument, match="expected a rank of at least 1"):
        aggregate_adapter_folders(received, clients, out, Mean(), product=True)


def test_rank_stabilised_adapters_are_scaled_by_the_root(cohort):
    received, clients, out = cohort
    for each in (received, *clients):
        change_config(each, use_rslora=True)
    result = aggregate_adapter_folders(received, clients, out, Mean(), product=True)
    expected = aggregate_adapters(
        Mean(), [load_file(e / WEIGHTS) for e in clients], load_file(received / WEIGHTS), scaling=6 / 2**0.5
    )
    assert all(torch.allclose(result.state[name], entry, atol=1e-5) for name, entry in expected.factors.items())


def test_a_plan_releases_a_noisy_adapter_with_its_head(cohort):
    received, clients, out = cohort
    plan = DPPlan(noise_multiplier=1.0, max_grad_norm=0.5, sample_rate=1.0, delta=1e-3, sampling="full")
    server = StateDictServer(plan=plan, population=40, seed=0)
    spoiled(clients[0], "a pickle")
    aggregate_adapter_folders(received, clients, out, server)
    start, after = load_file(received / WEIGHTS), load_file(out / WEIGHTS)
    moved = {name: (after[name] - start[name]).flatten() for name in after}
    # 155 values; the five clients together move each by far less than the noise of 0.5 / 40
    assert float(torch.cat(list(moved.values())).std()) == pytest.approx(0.5 / 40, rel=0.35)
    assert all(float(part.abs().max()) > 0 for part in moved.values()), "no entry is left without noise"
    assert server.epsilon == plan.epsilon(1)


def test_folders_are_never_held_all_at_once(cohort, monkeypatch):
    """Blocks of ten columns: no read is longer, and each client is read from its file."""
    import numpy as np

    from privfm import blocks

    received, clients, out = cohort
    expected = aggregate_adapter_folders(received, clients, out, TrimmedMean(1))
    counts, real = [], np.fromfile

    def watched(path, dtype, count=-1, offset=0):
        counts.append(count)
        return real(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", watched)
    monkeypatch.setattr(blocks, "BLOCK", 10)
    found = aggregate_adapter_folders(received, clients, out.with_name("blocks"), TrimmedMean(1))
    assert 0 < max(counts) <= 40
    assert all(torch.allclose(found.state[name], expected.state[name]) for name in expected.state)
