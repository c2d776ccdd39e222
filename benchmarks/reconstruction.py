"""What attacks read of gradients, by batch size: exact sentences, false ones, scores and seconds.

`python -m benchmarks.reconstruction [--quick]` prints JSON lines. Published rows are of other models and data, which is
why no target follows from them; targets stand beside `perfect` and `one minute`.

| part       | work                                                                                               |
|------------|----------------------------------------------------------------------------------------------------|
| `encoder`  | MiniLM, all parameters' gradient, sentences of 8 to 16 tokens, nothing told: batches of 1 to 32    |
| `frontier` | the same, where it gets hard: batches of 48 and 64, sentences to 28 tokens, no biases, six         |
|            | classes, a trained model, clipping, dropout, two local steps                                       |
| `decoder`  | GPT-2 and Llama with random weights, next-token loss; a pretrained one by `--decoder FOLDER`       |
| `adapters` | LoRA of rank 8 on MiniLM's queries and values: tokens and sentences by number of rounds            |
| `images`   | Inverting Gradients on scikit-learn's digits, MNIST by `--mnist FILE`, ResNet-20 by `--resnet FILE`|

Batches are drawn by seeds from 7000 on, on which nothing was chosen. `ratio` is ours / theirs for scores and theirs /
ours for seconds.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.resnet import ResNet20
from benchmarks.timing import write
from privfm.attacks.reconstruction import (
    AttentionPursuit,
    InvertingGradients,
    LoRAReconstruction,
    SpanSearch,
    score_images,
    score_texts,
    score_tokens,
)
from privfm.contracts import Declared, LocalSteps, Observation, Reconstruction, gradients_of
from privfm.learning import (
    CausalLanguageModel,
    Digits,
    Docstrings,
    ImageArrays,
    LoRA,
    SequenceClassifier,
    SmallCNN,
    WholeModel,
)

FIRST_SEED = 7000
SHORT, LONG = (8, 16), (16, 28)  # tokens, special ones included
EXACT = {1: 0.99, 2: 0.99, 4: 0.99, 8: 0.99, 16: 0.97, 24: 0.97, 32: 0.97}  # share of sentences aimed for
SECONDS = 60.0  # a batch, at most

PUBLISHED = {
    "DAGER, published (BERT, CoLA)": {1: 1.0, 2: 1.0, 4: 0.94, 8: 0.678},
    "LAMP, published (BERT, CoLA)": {1: 0.896, 8: 0.529},
    "TAG, published (BERT, CoLA)": {1: 0.789, 8: 0.459},
}
"""ROUGE-1, 100 batches each: Petrov et al., "DAGER", 2024, table 2."""

DECODERS = {
    "DAGER, published (GPT-2, CoLA)": {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 0.303},
}
"""The same, table 3."""

Text = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What one client holds.

    Attributes:
      texts: token ids.
      labels: their classes.
    """

    texts: list[Text]
    labels: list[int]

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Token ids `(b, T)`, padded with 0 on the right, and their mask."""
        longest = max(map(len, self.texts))
        tokens = torch.zeros(len(self.texts), longest, dtype=torch.int64)
        for row, text in zip(tokens, self.texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        lengths = torch.tensor([len(text) for text in self.texts])
        return tokens, (torch.arange(longest) < lengths[:, None]).long()


def drawn(texts: Sequence[Text], count: int, seed: int, classes: int = 2) -> Batch:
    """A batch by its seed."""
    source = random.Random(seed)
    return Batch(source.sample(texts, count), [source.randrange(classes) for _ in range(count)])


@lru_cache(maxsize=4)
def minilm(classes: int = 2) -> nn.Module:
    """MiniLM under a random head, all of it trained, without dropout."""
    source = SequenceClassifier("minilm", adapter=WholeModel(), pooling="model")
    return source.build([str(label) for label in range(classes)], torch.Generator().manual_seed(0)).module


@lru_cache(maxsize=2)
def sentences(least: int, most: int) -> list[Text]:
    """All sentences of so many tokens; none is cut."""
    source = SequenceClassifier("minilm", adapter=None)
    tokenize = source.build(["a", "b"], torch.Generator().manual_seed(0)).tokenize
    assert tokenize is not None  # a text model has a tokenizer
    encoded = tokenize([str(text) for text in Docstrings().load().inputs])
    lengths = encoded["attention_mask"].sum(1)
    rows = ((lengths >= least) & (lengths <= most)).nonzero()[:, 0].tolist()
    return list(dict.fromkeys(tuple(encoded["input_ids"][row, : lengths[row]].tolist()) for row in rows))


def classifier_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    tokens, mask = batch.padded
    output: Any = model(input_ids=tokens, attention_mask=mask)
    return nn.functional.cross_entropy(getattr(output, "logits", output), torch.tensor(batch.labels))


def language_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over all next tokens."""
    tokens, mask = batch.padded
    output: Any = model(input_ids=tokens, attention_mask=mask)
    following = tokens.masked_fill(mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), following)


# ------------------------------------------------------------------------------------------------------------ the lines


def line(
    case: str, peer: str, metric: str, *, ours: float | None, theirs: float | None, target: float | None = None,
    why: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One line; of seconds less is better, of everything else more."""
    ratio = None
    if ours is not None and theirs is not None and min(ours, theirs) >= 0:
        over, under = (theirs, ours) if metric == "seconds" else (ours, theirs)
        ratio = over / under if under else None
    found = {
        "benchmark": "reconstruction", "case": case, "peer": peer, "metric": metric,
        "unit": {"seconds": "s", "psnr": "dB"}.get(metric, "share"), "ours": ours, "theirs": theirs, "ratio": ratio,
        "target": target, "met": None if ratio is None or target is None else ratio >= target,
    }  # fmt: skip
    return found | {"reason": why} if why else found


@dataclass(frozen=True)
class Outcome:
    """One batch's scores.

    Attributes:
      exact: sentences recovered exactly, of all.
      texts: number of sentences.
      right, said: predictions that are somebody's sentence, and all of them.
      rouge_1: mean.
      tokens: recall of distinct tokens.
      seconds: of the attack.
    """

    exact: float
    texts: int
    right: int
    said: int
    rouge_1: float
    tokens: float
    seconds: float


def outcome(found: Reconstruction, batch: Batch) -> Outcome:
    """A reconstruction against the batch; special tokens do not count for ROUGE."""
    special = frozenset.intersection(*map(frozenset, batch.texts)) if len(batch.texts) > 1 else frozenset({101, 102})
    score = score_texts(found.texts, batch.texts, special)
    tokens = score_tokens(found.tokens.union(*found.texts), batch.texts)
    return Outcome(
        score_texts(found.texts, batch.texts).exact, len(batch.texts), len(found.texts) - score.false,
        len(found.texts), score.rouge_1, tokens.recall, found.seconds,
    )  # fmt: skip


def lines_of(
    case: str, outcomes: Sequence[Outcome], target: float | None, peers: dict[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """What all batches of a case gave together."""
    texts = sum(one.texts for one in outcomes)
    exact = sum(one.exact * one.texts for one in outcomes) / texts
    said, right = sum(one.said for one in outcomes), sum(one.right for one in outcomes)
    yield line(case, "perfect", "exact sentences", ours=exact, theirs=1.0, target=target, why=f"{texts} sentences")
    yield line(
        case, "perfect", "true predictions", ours=right / said if said else None, theirs=1.0,
        target=None if target is None else 1.0, why=f"{said - right} false of {said}",
    )  # fmt: skip
    rouge = fmean(one.rouge_1 for one in outcomes)
    yield line(case, "perfect", "ROUGE-1", ours=rouge, theirs=1.0)
    for peer, theirs in (peers or {}).items():
        yield line(case, peer, "ROUGE-1", ours=rouge, theirs=theirs)
    yield line(case, "perfect", "tokens", ours=fmean(one.tokens for one in outcomes), theirs=1.0)
    slowest = max(one.seconds for one in outcomes)
    yield line(
        case, "one minute", "seconds", ours=slowest, theirs=SECONDS, target=None if target is None else 1.0,
        why=f"slowest of {len(outcomes)}; mean {fmean(one.seconds for one in outcomes):.1f} s",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the parts


def encoder(quick: bool, batches: int, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of every size, nothing told."""
    pool = sentences(*SHORT)
    for size in (1, 2) if quick else EXACT:
        outcomes = []
        for seed in range(FIRST_SEED, FIRST_SEED + batches):
            batch = drawn(pool, size, seed)
            model = minilm()
            observation = Observation(model, gradients_of(model, classifier_loss(model, batch)))
            outcomes.append(outcome(AttentionPursuit()(observation, seconds=SECONDS), batch))
        peers = {peer: rows[size] for peer, rows in PUBLISHED.items() if size in rows}
        yield from lines_of(f"MiniLM, full gradient, batch {size}", outcomes, EXACT[size], peers)


def attacked(model: nn.Module, batch: Batch, tensors: dict[str, Tensor], change: LocalSteps | None = None) -> Outcome:
    """The pursuit on one observation."""
    return outcome(AttentionPursuit()(Observation(model, tensors, change), seconds=SECONDS), batch)


def plain(model: nn.Module, batch: Batch) -> Outcome:
    """All parameters' gradient."""
    return attacked(model, batch, gradients_of(model, classifier_loss(model, batch)))


def without_biases(model: nn.Module, batch: Batch) -> Outcome:
    """The same, with no bias sent."""
    found = gradients_of(model, classifier_loss(model, batch))
    return attacked(model, batch, {name: value for name, value in found.items() if not name.endswith("bias")})


def clipped(model: nn.Module, batch: Batch) -> Outcome:
    """Every example's gradient cut to norm 0.1, each by another factor."""
    total: dict[str, Tensor] = {}
    for text, label in zip(batch.texts, batch.labels, strict=True):
        found = gradients_of(model, classifier_loss(model, Batch([text], [label])))
        norm = torch.cat([value.flatten() for value in found.values()]).norm()
        factor = float((0.1 / norm).clamp(max=1)) / len(batch.texts)
        total = {name: total.get(name, torch.zeros(())) + factor * value for name, value in found.items()}
    return attacked(model, batch, total)


def with_dropout(model: nn.Module, batch: Batch) -> Outcome:
    """The client's dropout is on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(batch.texts))
        model.train()
        found = gradients_of(model, classifier_loss(model, batch))
        model.eval()
    return attacked(model, batch, found)


def local_steps(rate: float, steps: int) -> Callable[[nn.Module, Batch], Outcome]:
    """Gradient descent on the whole batch; the difference of weights is sent in float32."""

    def run(model: nn.Module, batch: Batch) -> Outcome:
        trained = copy.deepcopy(model)
        own = dict(trained.named_parameters())
        for _ in range(steps):
            found = gradients_of(trained, classifier_loss(trained, batch))
            with torch.no_grad():
                for name, value in found.items():
                    own[name].sub_(rate * value)
        before = dict(model.named_parameters())
        moved = {name: own[name].detach() - before[name].detach() for name in found}
        return attacked(model, batch, moved, LocalSteps(rate, steps))

    return run


@lru_cache(maxsize=1)
def trained_minilm() -> nn.Module:
    """MiniLM after 30 steps on sentences' own classes: a head that has learned something."""
    source = SequenceClassifier("minilm", adapter=WholeModel(), pooling="model")
    table = Docstrings(limit=1500).load()
    built = source.build(table.label_names, torch.Generator().manual_seed(0))
    assert built.tokenize is not None  # a text model has a tokenizer
    optimizer = torch.optim.AdamW(built.module.parameters(), lr=5e-5)
    for step in range(30):
        rows = range(step * 32, (step + 1) * 32)
        inputs = built.tokenize([str(table.inputs[row]) for row in rows])
        output: Any = built.module(**inputs)
        loss = nn.functional.cross_entropy(output.logits, table.labels[rows.start : rows.stop])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    built.module.zero_grad()
    return built.module


def frontier(quick: bool, batches: int, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Where the encoder's attack gets hard; no targets, the honest number."""
    short = (2,) if quick else (8, 16)
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, int], Sequence[int], int, Callable[..., Outcome]]] = [
        ("no biases", minilm, SHORT, short, 2, without_biases),
        ("six classes", lambda: minilm(6), SHORT, short, 6, plain),
        ("clipping", minilm, SHORT, short, 2, clipped),
        ("dropout", minilm, SHORT, short, 2, with_dropout),
        ("2 local steps, rate 1e-2", minilm, SHORT, short, 2, local_steps(1e-2, 2)),
    ]
    if not quick:
        cases += [
            ("larger batch", minilm, SHORT, (48, 64), 2, plain),
            ("16 to 28 tokens", minilm, LONG, (4, 8, 16), 2, plain),
            ("trained, six classes", trained_minilm, SHORT, short, 6, plain),
            ("1 local step, rate 1e-2", minilm, SHORT, short, 2, local_steps(1e-2, 1)),
        ]
    for name, model, lengths, sizes, classes, run in cases:
        pool = sentences(*lengths)
        for size in sizes:
            seeds = range(FIRST_SEED, FIRST_SEED + batches)
            outcomes = [run(model(), drawn(pool, size, seed, classes)) for seed in seeds]
            yield from lines_of(f"MiniLM, {name}, batch {size}", outcomes, None)


def random_decoder(kind: str, width: int, vocabulary: int) -> Any:
    """Four blocks with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    heads = width // 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "GPT-2":
            own = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=4, n_head=heads, n_positions=64,
                             bos_token_id=101, eos_token_id=102)  # fmt: skip
            return GPT2LMHeadModel(own)
        other = LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=4, num_attention_heads=heads,
                            num_key_value_heads=max(heads // 2, 1), intermediate_size=2 * width,
                            max_position_embeddings=64, bos_token_id=101, eos_token_id=102)  # fmt: skip
        return LlamaForCausalLM(other)


def decoder(quick: bool, batches: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Next-token loss of decoders; nothing told."""
    pool, vocabulary = sentences(*SHORT), 30522
    sizes, batches = ((2,), batches) if quick else ((1, 4, 8, 16, 32), min(batches, 3))
    for kind in ("GPT-2", "Llama"):
        model = random_decoder(kind, 128 if quick else 384, vocabulary).eval()
        for size in sizes:
            outcomes = [_spanned(model, drawn(pool, size, seed)) for seed in range(FIRST_SEED, FIRST_SEED + batches)]
            peers = {peer: rows[size] for peer, rows in DECODERS.items() if size in rows}
            yield from lines_of(f"{kind} with random weights, batch {size}", outcomes, 0.99, peers)
    if given.decoder is None:
        yield line("pretrained decoder", "perfect", "exact sentences", ours=None, theirs=1.0, why="give --decoder")
        return
    built = CausalLanguageModel(str(given.decoder), adapter=WholeModel(), max_length=16).build(
        [], torch.Generator().manual_seed(0)
    )
    assert built.tokenize is not None  # a text model has a tokenizer
    encoded = built.tokenize([str(text) for text in Docstrings(limit=600).load().inputs])
    own = [tuple(row[mask.bool()].tolist()) for row, mask in zip(encoded["input_ids"], encoded["attention_mask"],
                                                                 strict=True)]  # fmt: skip
    for size in (1, 2, 4) if quick else (1, 2, 4, 8, 32):
        seeds = range(FIRST_SEED, FIRST_SEED + batches)
        outcomes = [_spanned(built.module, drawn(own, size, seed)) for seed in seeds]
        yield from lines_of(f"{given.decoder.name}, batch {size}", outcomes, None)


def _spanned(model: nn.Module, batch: Batch) -> Outcome:
    observation = Observation(model, gradients_of(model, language_loss(model, batch)))
    return outcome(SpanSearch()(observation, seconds=5 * SECONDS), batch)


def adapters(quick: bool, batches: int, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same batch in several rounds, the adapters moving in between on other data."""
    pool = sentences(*SHORT)
    cases = ((2, 2),) if quick else ((1, 1), (4, 1), (4, 2), (4, 3), (8, 3), (16, 4))
    for size, rounds in cases:
        seeds = range(FIRST_SEED, FIRST_SEED + (batches if quick else min(batches, 5)))
        outcomes = []
        for seed in seeds:
            batch = drawn(pool, size, seed)
            attack = LoRAReconstruction(texts=size <= 4, unproved=True)  # ROUGE counts what is not proved, too
            found = attack(_rounds(pool, batch, rounds, seed), seconds=2 * SECONDS)
            outcomes.append(outcome(found, batch))
        case = f"MiniLM, LoRA r = 8, batch {size}, {rounds} round(s)"
        yield from lines_of(case, outcomes, None)
        if (size, rounds) == (4, 3):
            rouge = fmean(one.rouge_1 for one in outcomes)
            yield line(case, "asked for", "ROUGE-1", ours=rouge, theirs=0.95, target=1.0)


def _rounds(pool: Sequence[Text], batch: Batch, rounds: int, seed: int) -> list[Observation]:
    source = SequenceClassifier("minilm", adapter=LoRA(rank=8), pooling="model")
    model = source.build(["no", "yes"], torch.Generator().manual_seed(seed)).module
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    found = []
    for step in range(3 + rounds):
        if step >= 3:  # B has moved
            kept = copy.deepcopy(model)
            found.append(Observation(kept, gradients_of(kept, classifier_loss(kept, batch))))
        loss = classifier_loss(model, drawn(pool, 8, 10**6 + 100 * seed + step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    model.zero_grad()
    return found


def images(quick: bool, batches: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Inverting Gradients; labels inferred, the number of images declared."""
    iterations, few = (50, 1) if quick else (2400, min(batches, 5))
    sets = {"digits, 8 x 8": Digits().load()}
    if given.mnist is not None:
        sets["MNIST, 28 x 28"] = ImageArrays(str(given.mnist), "x_train", "y_train").load()
    for name, table in sets.items():
        assert isinstance(table.inputs, Tensor)  # images are
        size = table.inputs.shape[-1]
        model = SmallCNN(size=size).build(table.label_names, torch.Generator().manual_seed(0)).module
        for count in (1,) if quick else (1, 4, 8):
            scores, chances, spent = [], [], []
            for seed in range(FIRST_SEED, FIRST_SEED + few):
                rows = torch.tensor(random.Random(seed).sample(range(len(table.labels)), count))
                own, labels = table.inputs[rows], table.labels[rows]
                loss = nn.functional.cross_entropy(model(pixel_values=own), labels)
                told = Declared(examples=count, shape=(1, size, size))
                attack = InvertingGradients(iterations=iterations)
                found = attack(Observation(model, gradients_of(model, loss), declared=told), seconds=2 * SECONDS)
                scores.append(score_images(found.images, own).mean_psnr)
                chances.append(score_images(table.inputs.mean(0, keepdim=True).expand_as(own), own).mean_psnr)
                spent.append(found.seconds)
            case = f"SmallCNN, {name}, batch {count}"
            yield line(case, "mean image", "psnr", ours=fmean(scores), theirs=fmean(chances))
            yield line(case, "two minutes", "seconds", ours=max(spent), theirs=2 * SECONDS)
    if given.mnist is None:
        yield line("MNIST", "mean image", "psnr", ours=None, theirs=None, why="give --mnist")
    if given.resnet is None:
        yield line("ResNet-20", "mean image", "psnr", ours=None, theirs=None, why="give --resnet")
    else:
        yield from _resnet(given.resnet, 20 if quick else 1000)


def _resnet(weights: Path, iterations: int) -> Iterator[dict[str, Any]]:
    """One photograph of 32 x 32 pixels; the network in evaluation mode."""
    from safetensors.torch import load_file
    from sklearn.datasets import load_sample_images

    model = ResNet20()
    model.load_state_dict(load_file(weights))
    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1).float()[None] / 255
    image = nn.functional.interpolate(photograph, (32, 32), mode="area")
    loss = nn.functional.cross_entropy(model.eval()(image), torch.tensor([3]))
    told = Declared(examples=1, shape=(3, 32, 32))
    attack = InvertingGradients(iterations=iterations, total_variation=1e-2)
    found = attack(Observation(model, gradients_of(model, loss), declared=told), seconds=5 * SECONDS)
    chance = image.mean((2, 3), keepdim=True).expand_as(image)
    yield line(
        "ResNet-20, 32 x 32, batch 1", "its mean colour", "psnr", ours=score_images(found.images, image).mean_psnr,
        theirs=score_images(chance, image).mean_psnr, why=f"{found.seconds:.0f} s {found.stopped}".strip(),
    )  # fmt: skip


PARTS: dict[str, Callable[[bool, int, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "encoder": encoder,
    "frontier": frontier,
    "decoder": decoder,
    "adapters": adapters,
    "images": images,
}


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconstruction", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one batch of the smallest sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all when left out")
    parser.add_argument("--batches", type=int, help="of each size; quick: 1, else 20, of the frontier 5")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--decoder", type=Path, help="a folder with a pretrained causal language model")
    parser.add_argument("--mnist", type=Path, help="an .npz file with x_train and y_train")
    parser.add_argument("--resnet", type=Path, help="a .safetensors file with a ResNet-20 for 32 x 32 images")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    for part in given.parts:
        batches = given.batches or (1 if given.quick else 5 if part == "frontier" else 20)
        for found in PARTS[part](given.quick, batches, given):
            write(found)


if __name__ == "__main__":
    main()
