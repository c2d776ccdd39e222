"""Negative controls of reconstruction, in rounds that are played as a run plays them: what must fail fails, and why.

Clients hold sentences of 6 to 9 tokens, of which 50 words and a beginning and an end are used; small random models are
trained whole. Noise that is public (a plan's, a codec's rounding) is told: an attack that is left in the dark about it
fails for no reason that protects anybody.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from fnmatch import fnmatch
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from privfm.attacks.reconstruction import (
    AttentionPursuit,
    BagOfWords,
    InvertingGradients,
    Labels,
    SpanSearch,
    chance_scores,
    observations,
    score_images,
    score_texts,
    score_tokens,
    texts_of,
)
from privfm.attacks.reconstruction.text_scores import attribution_accuracy
from privfm.contracts import (
    BuiltModel,
    Declared,
    LocalTraining,
    Observation,
    ReconstructionAttack,
    Split,
    Table,
    gradients_of,
)
from privfm.defenses import DPPlan, FixedPoint, GradientPruning, LocalSampling
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.selective import Selective
from privfm.defenses.channels.selective_maps import by_name
from privfm.defenses.transforms import Clip
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population
from privfm.federation.glimpse import glimpse
from privfm.learning import (
    SGD,
    CausalLM,
    Digits,
    ImageClassification,
    ModelLearner,
    OneStep,
    Schedule,
    SequenceClassification,
    SmallCNN,
    Workbench,
)
from privfm.randomness import Seeds

pytest.importorskip("transformers")

Text = tuple[int, ...]
Played = tuple[Observation, list[Text]]

WIDTH, WORDS, FIRST, LAST, LONGEST = 96, range(10, 60), 4, 5, 9
SPECIAL = frozenset({FIRST, LAST})
EVERYTHING = 10**6  # a batch of all that a client has
STEP = OneStep(1.0, EVERYTHING, dropout=False)
PRIVATE_STEP = SGD(1.0, Schedule(batch_size=EVERYTHING, steps=1))
BAG = BagOfWords(positions=LONGEST)
ROWS = BagOfWords(source="embedding")
FOUR = [[0], [1], [2], [3]]  # clients with one text each
EXACT_BITS = FixedPoint(2.0, 28)  # steps of 7e-9: a gradient's own rounding


def sentences(count: int, seed: int, words: Sequence[int] = WORDS) -> list[Text]:
    """Distinct texts of 6 to 9 tokens."""
    source, found = random.Random(seed), dict[Text, None]()
    while len(found) < count:
        found[(FIRST, *source.choices(words, k=source.randint(4, LONGEST - 2)), LAST)] = None
    return list(found)


def spelt(texts: Sequence[str]) -> dict[str, Tensor]:
    """The tokenizer: a token is a number."""
    rows = [[int(token) for token in text.split()] for text in texts]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": tokens, "attention_mask": mask}


def bench_of(kind: str, texts: Sequence[Text], frozen: tuple[str, ...] = ()) -> Workbench:
    """A model of random weights, and everybody's texts."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: Any = (
            BertForSequenceClassification(
                BertConfig(
                    vocab_size=300, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3,
                    intermediate_size=64, max_position_embeddings=24, initializer_range=0.1,
                )
            )
            if kind == "bert"
            else GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=300, n_embd=WIDTH, n_layer=2, n_head=3, n_positions=24, initializer_range=0.1,
                    bos_token_id=1, eos_token_id=2,
                )
            )
        ).eval()  # fmt: skip
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(fnmatch(name, pattern) for pattern in frozen))
    labels = torch.tensor([place % 2 for place in range(len(texts))])
    table = Table([" ".join(map(str, text)) for text in texts], labels, ("even", "odd"))
    task = SequenceClassification() if kind == "bert" else CausalLM()
    return Workbench(BuiltModel(module, spelt, (), lambda folder: None), task, table)


def federation_of(
    bench: Workbench, clients: Sequence[Sequence[int]], training: LocalTraining = STEP, seed: int = 0, **arm: Any
) -> Federation:
    """These rows at each client."""
    taken = {row for client in clients for row in client}
    splits: dict[Split, Tensor] = {
        "validation": torch.tensor([row for row in range(len(bench.everything)) if row not in taken][:4])
    }
    cohort = None if "plan" in arm else FixedSize(len(clients))
    population = Population.of(bench.everything, [torch.tensor(list(client)) for client in clients])
    learner = ModelLearner(bench, splits, training, engine="sequential")
    return Federation(Arm(cohort, **arm), learner, population, Seeds(seed), Local(1))


def played(
    bench: Workbench, clients: Sequence[Sequence[int]], training: LocalTraining = STEP, noise: float = 0.0, **arm: Any
) -> Played:
    """One round: what the server received of the first client, or of all, and whose texts these are."""
    federation = federation_of(bench, clients, training, **arm)
    seen = glimpse(federation)
    change = training.local_steps(len(federation.clients.examples(0)))
    first = observations(seen.wire, bench.layout, bench.load(seen.model), change)[0]
    whose = range(1) if seen.wire.rows is not None else range(len(clients))
    return first.told(noise=noise), texts_of([federation.clients.examples(client) for client in whose])


def rounding(codec: FixedPoint, clients: int) -> float:
    """Deviation that random rounding leaves on a mean: `f (1 - f)` of a step squared, 1/6 over all fractions f."""
    return float(codec.step / (6 * clients) ** 0.5)


def recall(found: Any, texts: Sequence[Text]) -> float:
    return score_tokens(found.tokens.union(*found.texts), texts, SPECIAL).recall


def whole_norm(observation: Observation) -> float:
    return float(torch.cat([one.flatten() for one in observation.gradients.values()]).norm())


def private(noise_multiplier: float, clip: float) -> dict[str, Any]:
    """One step in which each client clips each example's gradient and adds the noise itself."""
    local = LocalSampling(batch_size=EVERYTHING, local_steps=1)
    plan = DPPlan(noise_multiplier, clip, 1.0, 1e-5, unit="example", place="local", sampling="full", local=local)
    return {"training": PRIVATE_STEP, "plan": plan}


@pytest.fixture(scope="module")
def encoder() -> Workbench:
    return bench_of("bert", sentences(60, seed=1))


@pytest.fixture(scope="module")
def decoder() -> Workbench:
    return bench_of("gpt2", sentences(60, seed=1))


# ------------------------------------------------------------------------------------------------ foreign and permuted


def test_the_gradient_of_one_batch_says_nothing_of_another(encoder: Workbench) -> None:
    """Scored against texts that were not there, exact texts of another batch are as good as any foreign texts."""
    generator = torch.Generator().manual_seed(0)
    everybody = texts_of([encoder.everything])
    attacked, drawn, own = [], [], []
    for seed in range(6):
        rows = random.Random(seed).sample(range(60), 8)
        observation, texts = played(encoder, [rows[:4]])
        found = AttentionPursuit()(observation)
        others = [everybody[row] for row in rows[4:]]
        foreign = [text for text in everybody if text not in others]
        own.append(score_texts(found.texts, texts, SPECIAL).exact)
        attacked.append(score_texts(found.texts, others, SPECIAL).rouge_1)
        by_chance = chance_scores(foreign, others, SPECIAL, predictions=len(found.texts), draws=50, generator=generator)
        drawn.append([score.rouge_1 for score in by_chance])
    assert fmean(own) == 1.0  # the attack works; only the truth is another
    expected, error = fmean(map(fmean, drawn)), fmean(map(stdev, drawn)) / len(attacked) ** 0.5
    assert 0.1 < expected < 0.5
    assert abs(fmean(attacked) - expected) < 4 * error


@pytest.mark.parametrize("attack", [AttentionPursuit(), BAG, SpanSearch()], ids=lambda one: type(one).__name__)
def test_permuted_entries_give_nothing(attack: ReconstructionAttack, encoder: Workbench, decoder: Workbench) -> None:
    for bench in [decoder] if isinstance(attack, SpanSearch) else [encoder]:
        observation, texts = played(bench, [[0, 1, 2, 3]])
        assert recall(attack(observation), texts) == 1.0
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            mixed = {
                name: one.flatten()[torch.randperm(one.numel(), generator=generator)].view(one.shape)
                for name, one in observation.tensors.items()
            }
            found = attack(Observation(observation.model, mixed, observation.change), seconds=5)
            assert (found.texts, found.tokens) == ((), frozenset())


def test_permuted_rows_of_the_embedding_name_tokens_by_chance(encoder: Workbench) -> None:
    """Which rows are not zero is all there is: permuted, they name as many tokens, that are right as often as any."""
    observation, texts = played(encoder, [[0, 1, 2, 3]])
    name = "bert.embeddings.word_embeddings.weight"
    true = {token for text in texts for token in text}
    right = 0
    for seed in range(40):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        found = ROWS(Observation(observation.model, {name: observation.gradients[name][order]}))
        assert len(found.tokens) == len(true)
        right += len(found.tokens & true)
    drawn = 40 * len(true)
    share = len(true) / 300
    assert abs(right - drawn * share) < 4 * (drawn * share * (1 - share)) ** 0.5  # hypergeometric is narrower


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_one_private_step_leaves_nothing_at_the_attackers_best_clip(
    kind: str, batch: int, encoder: Workbench, decoder: Workbench
) -> None:
    bench = encoder if kind == "bert" else decoder
    rows = list(range(batch))
    clip = max(whole_norm(played(bench, [[row]])[0]) for row in rows)  # shortens no example's gradient
    attacks = [AttentionPursuit(), BAG, ROWS] if kind == "bert" else [SpanSearch(), BAG]
    for noise_multiplier, seed in ((0.3, 0), (0.3, 1), (1.0, 0)):
        noise = noise_multiplier * clip / batch
        observation, texts = played(bench, [rows], noise=noise, seed=seed, **private(noise_multiplier, clip))
        unused = [token for token in range(100, 300) if token not in WORDS]
        embedding = "bert.embeddings.word_embeddings.weight" if kind == "bert" else "transformer.wpe.weight"
        idle = observation.gradients[embedding][unused if kind == "bert" else slice(LONGEST, None)]
        assert float(idle.std()) == pytest.approx(noise, rel=0.1)  # what is told is what is there
        for attack in attacks:
            found = attack(observation, seconds=20)
            assert found.texts == (), attack
            assert len(found.tokens) <= 1, attack  # one by chance: 0.01 are expected
    for attack in attacks:  # the same at hardly any noise: it is the noise that protects
        observation, texts = played(bench, [rows], noise=1e-7 * clip / batch, **private(1e-7, clip))
        assert recall(attack(observation, seconds=20), texts) == 1.0, attack


def test_more_noise_never_scores_better(encoder: Workbench) -> None:
    """Over six decades, within twice the standard error of the seeds at either level."""
    levels = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-1)
    exact: list[list[float]] = []
    words: list[list[float]] = []
    for level in levels:
        texts_found, words_found = [], []
        for seed in range(3):
            rows = random.Random(seed).sample(range(60), 4)
            clip = 4.0
            observation, texts = played(encoder, [rows], noise=level * clip / 4, seed=seed, **private(level, clip))
            found = AttentionPursuit()(observation, seconds=10)
            texts_found.append(score_texts(found.texts, texts, SPECIAL).exact)
            words_found.append(recall(BAG(observation), texts))
        exact.append(texts_found)
        words.append(words_found)
    for scores in (exact, words):
        for less, more in pairwise(scores):
            spread = ((stdev(less) ** 2 + stdev(more) ** 2) / 3) ** 0.5
            assert fmean(more) <= fmean(less) + 2 * spread
        assert fmean(scores[0]) == 1.0
        assert fmean(scores[-1]) == 0.0


def test_noise_nobody_has_told_of_makes_up_nothing(encoder: Workbench) -> None:
    for level in (1e-6, 1e-4, 1e-2, 0.3):
        observation, texts = played(encoder, [[0, 1]], **private(level, 4.0))
        own = {token for text in texts for token in text}
        for attack in (AttentionPursuit(), BAG):
            found = attack(observation, seconds=10)
            assert set(found.texts) <= set(texts)
            assert found.tokens <= own
        assert "no row of the embedding's gradient is zero" in ROWS.refusal(observation)


def test_clipping_alone_changes_nothing(encoder: Workbench, decoder: Workbench) -> None:
    for bench, attack in ((encoder, AttentionPursuit()), (encoder, BAG), (encoder, ROWS), (decoder, SpanSearch())):
        plain, texts = played(bench, [[0, 1, 2, 3]])
        short = whole_norm(plain) / 50
        clipped, _ = played(bench, [[0, 1, 2, 3]], transforms=(Clip(short),))
        assert whole_norm(clipped) == pytest.approx(short, rel=1e-4)
        one, other = attack(plain), attack(clipped)
        assert set(one.texts) == set(other.texts)
        assert one.tokens == other.tokens
        assert recall(one, texts) == 1.0


# ---------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_secure_sum_hides_who_and_not_what(kind: str, encoder: Workbench, decoder: Workbench) -> None:
    """It is the batch of all: texts are exact, and which client one is of is a guess, right once in four times."""
    bench, attack = (encoder, AttentionPursuit()) if kind == "bert" else (decoder, SpanSearch())
    summed, texts = played(bench, FOUR, transforms=(EXACT_BITS,), channel=PairwiseMasks(4))
    assert summed.clients == 4
    together, _ = played(bench, [[0, 1, 2, 3]])
    for name, one in together.gradients.items():
        assert torch.allclose(summed.gradients[name], one, atol=1e-6), name
    found = attack(summed.told(noise=rounding(EXACT_BITS, 4)))
    score = score_texts(found.texts, texts, SPECIAL)
    assert (score.exact, score.false) == (1.0, 0)
    source = random.Random(0)
    guesses = [
        attribution_accuracy(score, [source.randrange(4) for _ in found.texts], list(range(4))) for _ in range(500)
    ]
    assert abs(fmean(guesses) - 1 / 4) < 4 * (1 / 4 * 3 / 4 / (4 * 500)) ** 0.5


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_past_the_width_a_secure_sum_hides_what_too_but_for_a_trained_embedding(kind: str) -> None:
    texts = sentences(40, seed=2, words=range(10, 300))
    frozen = ("*word_embeddings*",) if kind == "bert" else ("*wte*",)
    bench = bench_of(kind, texts, frozen)
    attacks = [AttentionPursuit(), BAG] if kind == "bert" else [SpanSearch(), BAG]
    # Distinct tokens and positions of an encoder, distinct prefixes of a decoder: 47 and 40 at 8 clients, under 96.
    for clients, share in ((8, 1.0), (24, 0.0)):
        channel = PairwiseMasks(clients, modulus_bits=40)
        observation, own = played(
            bench, [[row] for row in range(clients)], transforms=(EXACT_BITS,), channel=channel,
            noise=rounding(EXACT_BITS, clients),
        )  # fmt: skip
        for attack in attacks:
            found = attack(observation, seconds=20)
            assert recall(found, own) >= share - (0.2 if kind == "gpt2" else 0.0), attack  # a text's last is no input
            assert share == 1.0 or (found.texts, found.tokens) == ((), frozenset()), attack
    if kind == "bert":  # rows of a trained embedding add up without mixing, however many there are
        observation, own = played(
            bench_of("bert", texts), [[row] for row in range(24)], transforms=(EXACT_BITS,),
            channel=PairwiseMasks(24, modulus_bits=40),
        )  # fmt: skip
        found = ROWS(observation)
        assert found.tokens == {token for text in own for token in text}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_batch_that_fills_the_width_names_no_token(kind: str) -> None:
    """A fresh model's norms have no shift: inputs lie on a hyperplane, whose whole span is sharp and says nothing."""
    bench = bench_of(kind, sentences(40, seed=2, words=range(10, 300)))
    observation, _ = played(bench, [list(range(24))])
    for attack in [AttentionPursuit(), BAG] if kind == "bert" else [SpanSearch(), BAG]:
        found = attack(observation, seconds=20)
        assert (found.texts, found.tokens) == ((), frozenset()), attack


@pytest.mark.parametrize("clients", [1, 4])
def test_how_fine_a_codec_must_be(clients: int, encoder: Workbench) -> None:
    """20 bits of a bound of 2 are exact even if nobody tells the public step; of 16 it has to be told; 8 are not.

    That an attack fails untold says nothing of the codec: 16 bits protect few sentences. What is left at 8 bits is a
    bag: rows of the embedding are zero or not.
    """
    texts = {}
    for bits in (8, 16, 20, 28):
        codec = FixedPoint(2.0, bits)
        channel = {"channel": PairwiseMasks(clients)} if clients > 1 else {}
        batch = FOUR if clients > 1 else [[0, 1, 2, 3]]
        observation, own = played(encoder, batch, transforms=(codec,), **channel)
        for told in (False, True):
            found = AttentionPursuit()(observation.told(noise=rounding(codec, clients) if told else 0.0), seconds=10)
            texts[bits, told] = score_texts(found.texts, own, SPECIAL)
            assert texts[bits, told].false == 0
        assert recall(ROWS(observation), own) == 1.0
    exact = {key: one.exact for key, one in texts.items()}
    assert [exact[bits, False] for bits in (8, 16, 20, 28)] == [0.0, 0.0, 1.0, 1.0]
    assert [exact[bits, True] for bits in (8, 20, 28)] == [0.0, 1.0, 1.0]
    assert exact[16, True] >= 0.5


# ------------------------------------------------------------------------------- what other defences leave, and do not


def left(bench: Workbench, clients: Sequence[Sequence[int]], **how: Any) -> dict[str, tuple[float, float] | str]:
    """Of each attack: share of exact texts and of tokens, or why it cannot run. None of them may make up a text."""
    observation, texts = played(bench, clients, **how)
    found: dict[str, tuple[float, float] | str] = {}
    for name, attack in {"pursuit": AttentionPursuit(), "span": BAG, "rows": ROWS}.items():
        if refusal := attack.refusal(observation):
            found[name] = refusal
            continue
        answer = attack(observation, seconds=20)
        score = score_texts(answer.texts, texts, SPECIAL)
        assert score.false == 0, name
        assert answer.tokens <= {token for text in texts for token in text}, name
        found[name] = (score.exact, round(recall(answer, texts), 3))
    return found


def test_frozen_embeddings_hide_their_own_gradient_alone(encoder: Workbench) -> None:
    found = left(bench_of("bert", sentences(60, seed=1), ("*embeddings*",)), [[0, 1, 2, 3]])
    assert (found["pursuit"], found["span"]) == ((1.0, 1.0), (0.0, 1.0))
    assert "was not sent whole" in found["rows"]


def test_dropout_hides_sentences_and_no_words(encoder: Workbench) -> None:
    found = left(encoder, [[0, 1, 2, 3]], training=OneStep(1.0, EVERYTHING, dropout=True))
    assert found == {"pursuit": (0.0, 0.0), "span": (0.0, 0.0), "rows": (0.0, 1.0)}


def test_several_local_steps_hide_sentences_as_the_model_moves(encoder: Workbench) -> None:
    """One step of a plain loop is exact; of two, the second is taken at weights that have moved by the rate."""
    exact = {}
    for rate, steps in ((0.1, 1), (0.01, 2), (0.1, 2)):
        found = left(encoder, [[0, 1, 2, 3]], training=SGD(rate, Schedule(batch_size=EVERYTHING, steps=steps)))
        assert found["rows"] == (0.0, 1.0)
        assert found["pursuit"][1] == 1.0
        exact[rate, steps] = found["pursuit"][0]
    assert exact[0.1, 1] == 1.0
    assert exact[0.01, 2] > 0
    assert exact[0.1, 2] == 0.0


def test_pruning_hides_sentences_and_not_the_words(encoder: Workbench) -> None:
    sizes = encoder.layout.sizes
    for share, words in ((0.5, 1.0), (0.9, 1.0), (0.99, 0.7)):
        found = left(encoder, [[0, 1, 2, 3]], transforms=(GradientPruning(share, sizes),))
        assert (found["pursuit"], found["span"]) == ((0.0, 0.0), (0.0, 0.0))
        assert found["rows"][1] >= words


def test_selective_encryption_protects_what_it_encrypts(encoder: Workbench) -> None:
    """Rows arrive alone: what is left in the clear is one client's, not the sum's."""

    def encrypted(*patterns: str) -> dict[str, tuple[float, float] | str]:
        channel = Selective(PairwiseMasks(4), by_name(encoder.layout, patterns))
        codec = FixedPoint(8.0, 28)
        return left(encoder, FOUR, transforms=(codec,), channel=channel, noise=rounding(codec, 1))

    first = "*layer.0.attention.self*"
    embeddings = encrypted("*embeddings*", "*classifier*")
    assert (embeddings["pursuit"], embeddings["span"]) == ((1.0, 1.0), (0.0, 1.0))
    assert "was not sent whole" in embeddings["rows"]
    attention = encrypted(first)
    assert "was not sent" in attention["pursuit"]
    assert "no whole gradient" in attention["span"]
    assert attention["rows"] == (0.0, 1.0)
    assert all(isinstance(one, str) for one in encrypted(first, "*embeddings*").values())
    labels = Labels()
    observation, _ = played(
        encoder, FOUR, transforms=(FixedPoint(8.0, 28),),
        channel=Selective(PairwiseMasks(4), by_name(encoder.layout, (first, "*embeddings*"))),
    )  # fmt: skip
    assert labels(observation.told(examples=1)).labels == (0,)  # the head was left in the clear: of client 0


def test_adapters_that_have_moved_do_not_mislead_a_pursuit_of_the_whole_gradient(encoder: Workbench) -> None:
    """Queries and keys are those of the weight and the adapter together."""
    peft = pytest.importorskip("peft")
    observation, texts = played(encoder, [[0, 1]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"])
        model: Any = peft.get_peft_model(deepcopy(observation.model), config).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    inputs = spelt([" ".join(map(str, text)) for text in texts])
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 1]))
    found = AttentionPursuit()(Observation(model, gradients_of(model, loss)))
    assert set(found.texts) == set(texts)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def digits() -> Workbench:
    table = Digits().load()
    built = SmallCNN().build(table.label_names, torch.Generator().manual_seed(0))
    return Workbench(built, ImageClassification(), table)


def mean_psnr(images: Tensor, truth: Tensor) -> float:
    return score_images(images, truth).mean_psnr


@pytest.mark.parametrize("batch", [1, 8])
def test_an_image_behind_one_private_step_is_no_better_than_a_foreign_one(batch: int, digits: Workbench) -> None:
    iterations = 150 if batch == 1 else 60
    attack = InvertingGradients(iterations=iterations)
    everything = digits.everything.inputs["pixel_values"]
    scores: dict[str, list[float]] = {"private": [], "foreign": [], "plain": []}
    for seed in range(2):
        rows = random.Random(seed).sample(range(1000), batch)
        truth = everything[rows]
        norms = [whole_norm(seen_images(digits, [row])) for row in rows]
        for name, how in (("plain", {}), ("private", private(0.3, max(norms)))):
            observation = seen_images(digits, rows, seed=seed, **how)
            noise = 0.3 * max(norms) / batch if how else 0.0
            declared = Declared(examples=batch, shape=(1, 8, 8), labels=digits.everything.labels[rows], noise=noise)
            found = attack(Observation(observation.model, observation.tensors, observation.change, declared))
            assert found.images is not None
            scores[name].append(mean_psnr(found.images, truth))
        strangers = torch.randperm(700, generator=torch.Generator().manual_seed(seed)) + 1000
        drawn = [
            mean_psnr(everything[strangers[start : start + batch]], truth) for start in range(0, 20 * batch, batch)
        ]
        scores["foreign"].append(fmean(drawn))
    assert fmean(scores["private"]) < fmean(scores["foreign"]) + 1.0  # 1 dB: a foreign image's own spread
    assert fmean(scores["plain"]) > fmean(scores["private"]) + 1.0  # the attack sees something without the noise


def seen_images(bench: Workbench, rows: Sequence[int], seed: int = 0, **how: Any) -> Observation:
    training = how.pop("training", STEP)
    seen = glimpse(federation_of(bench, [rows], training, seed, **how))
    return observations(seen.wire, bench.layout, bench.load(seen.model), training.local_steps(len(rows)))[0]
