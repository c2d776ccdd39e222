"""Text models as an attack sees them, against what their own attention is given and what autograd gives their maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.text_models import GPT2, Encoder, Llama, TextModel, text_model
from privfm.checks import InvalidArgument
from privfm.contracts import gradients_of

library = pytest.importorskip("transformers")

WIDTH, VOCABULARY, DEPTH = 16, 40, 2
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_labels": 3,
}
_ROTARY: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_CLASSES: dict[str, tuple[str, str, dict[str, Any], type[TextModel]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SHAPE, Encoder),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _SHAPE, Encoder),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 24},
        Encoder,
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 32},
        GPT2,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _ROTARY, Llama),
    "mistral": ("MistralConfig", "MistralForCausalLM", _ROTARY, Llama),
    "qwen2": ("Qwen2Config", "Qwen2ForSequenceClassification", _ROTARY, Llama),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_ROTARY, "head_dim": 8}, Llama),
}
KINDS = list(_CLASSES)


def built(kind: str, adapters: bool = False) -> Any:
    """A small model with every parameter drawn, norms and biases too: ones and zeros would hide a forgotten term."""
    config, model, shape, _ = _CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = getattr(library, model)(getattr(library, config)(**shape))
        if adapters:
            from peft import LoraConfig, get_peft_model

            targets = {"gpt2": ["c_attn"], "distilbert": ["q_lin", "v_lin"]}
            default = ["query", "value"] if kind in ("bert", "roberta") else ["q_proj", "v_proj"]
            lora = LoraConfig(
                r=2, lora_alpha=6, target_modules=targets.get(kind, default), fan_in_fan_out=kind == "gpt2"
            )
            found = get_peft_model(found, lora)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found.eval()


def captured(model: nn.Module, module: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """What a module is given when the whole model runs, head and all."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
    hook.remove()
    return seen[0]


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (3, 7), generator=Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return tokens, mask


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_inputs_are_what_attention_is_given(kind: str, adapters: bool) -> None:
    model = built(kind, adapters)
    seen = text_model(model)
    assert type(seen) is _CLASSES[kind][3]
    assert (seen.vocabulary, seen.width, seen.depth, seen.heads) == (VOCABULARY, WIDTH, DEPTH, 4)
    assert seen.embedding.weight is dict(model.named_parameters())[seen.embedding_name]
    tokens, mask = batch()
    given = captured(model, seen.block(0).module, tokens, mask)
    positions = torch.arange(7).expand(3, 7)
    said = seen.first_inputs(tokens[mask == 1], positions[mask == 1])
    assert said.dtype == torch.float64
    torch.testing.assert_close(said, given[mask == 1].double(), rtol=1e-5, atol=1e-5)
    elsewhere = seen.first_inputs(tokens[0], torch.arange(7) + 1)
    moved = float((elsewhere - said[:7]).abs().max())
    assert moved > 0.01 if seen.positional else moved == 0


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_a_block_are_the_models_own(kind: str, adapters: bool) -> None:
    model = built(kind, adapters)
    seen = text_model(model)
    tokens, mask = batch()
    for number in range(DEPTH):
        expected = captured(model, seen.block(number).module, tokens, mask)
        found = seen.inputs(number, tokens, mask)
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)
    whole = captured(model, seen.block(1).module, tokens, torch.ones_like(mask))
    torch.testing.assert_close(seen.inputs(1, tokens), whole, rtol=1e-5, atol=1e-5)
    # A causal model gives a position the same whatever comes later; an encoder does not.
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 5) % (VOCABULARY - 3) + 3
    apart = float((seen.inputs(1, tokens)[:, :4] - seen.inputs(1, other)[:, :4]).abs().max())
    assert apart < 1e-5 if seen.causal else apart > 1e-4


def applied(seen: TextModel, given: Tensor, projection: Any, tensors: dict[str, Tensor]) -> Tensor:
    """What a map gives for inputs `(n, d)`, from the named tensors alone."""
    matrix, offset = projection.matrix(tensors), projection.offset(tensors)
    if projection.lora_a is not None and matrix.shape[0] == tensors[projection.lora_b].shape[0]:
        matrix = matrix + projection.scaling * tensors[projection.lora_b] @ tensors[projection.lora_a]
    result: Tensor = given @ matrix.T
    return result if offset is None else result + offset


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_a_block_are_the_models_weights(kind: str, adapters: bool) -> None:
    model = built(kind, adapters)
    seen = text_model(model)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    given = torch.randn(5, WIDTH, generator=Generator().manual_seed(1))
    for number in range(DEPTH):
        block = seen.block(number)
        modules = seen._attention(number)
        assert [one.inputs for one in block.projections] == [WIDTH] * 3
        assert block.query.outputs == seen.heads * seen.head_width
        assert block.key.outputs == block.value.outputs == seen.key_heads * seen.head_width
        if kind == "gpt2":
            with torch.no_grad():
                outputs = list(modules[0](given).split(WIDTH, dim=1))
            if adapters:  # one adapter for all three maps: its product is added to the three together
                lora = tensors[block.query.lora_b or ""] @ tensors[block.query.lora_a or ""] * block.query.scaling
                outputs = [out - part for out, part in zip(outputs, (given @ lora.T).split(WIDTH, dim=1), strict=True)]
        else:
            with torch.no_grad():
                outputs = [module(given) for module in modules]
        for projection, output in zip(block.projections, outputs, strict=True):
            torch.testing.assert_close(applied(seen, given, projection, tensors), output, rtol=1e-4, atol=1e-4)
        adapted = [one.lora_a is not None for one in block.projections]
        assert (
            adapted == ([True, True, True] if kind == "gpt2" else [True, False, True]) if adapters else not any(adapted)
        )
        if adapters:
            assert block.query.scaling == 3.0  # lora_alpha / r


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_map_lie_in_the_span_of_first_inputs(kind: str) -> None:
    model = built(kind).double()
    seen = text_model(model)
    tokens, _ = batch()
    output: Any = model(input_ids=tokens[:, :4])
    tensors = gradients_of(model, output.logits.square().mean())
    inputs = seen.first_inputs(tokens[:, :4].flatten(), torch.arange(4).repeat(3))
    basis = torch.linalg.qr(inputs.T).Q
    for projection in seen.block(0).projections:
        matrix = projection.matrix(tensors)
        assert matrix is not None and matrix.shape == (projection.outputs, WIDTH)
        outside = matrix.T - basis @ (basis.T @ matrix.T)
        assert float(matrix.norm()) > 0 and float(outside.norm() / matrix.norm()) < 1e-5
        assert projection.matrix({}) is None and projection.offset({}) is None


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_asking_leaves_the_model_as_it_was(kind: str) -> None:
    model = built(kind).train()
    next(iter(model.children())).eval()  # modes are mixed
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    seen = text_model(model)
    first, again = (seen.inputs(1, *batch()) for _ in range(2))
    assert bool((first == again).all()) and not first.requires_grad  # dropout sleeps
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
    assert bool((torch.get_rng_state() == state).all())
    with pytest.raises((IndexError, RuntimeError)):
        seen.inputs(0, torch.tensor([[VOCABULARY + 7]]))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sleep_ends_with_an_error_too() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), asleep(model):
        assert not model[0].training
        raise KeyError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_heads_of_language_models_are_named() -> None:
    tied, untied = text_model(built("gpt2")), text_model(built("llama"))
    assert tied.head_name == tied.embedding_name == "transformer.wte.weight"
    assert untied.head_name == "lm_head.weight" and untied.embedding_name == "model.embed_tokens.weight"
    assert text_model(built("bert")).head_name is None


def test_positions_of_an_encoder() -> None:
    roberta = text_model(built("roberta"))
    assert isinstance(roberta, Encoder) and roberta.first_position == 2
    assert roberta.most_positions == 512 - 2
    bert = text_model(built("bert"))
    assert isinstance(bert, Encoder) and bert.most_positions == 512
    embeddings: Any = bert.root.embeddings
    expected = embeddings.position_embeddings.weight[4] + embeddings.token_type_embeddings.weight[0]
    torch.testing.assert_close(bert.added(torch.tensor([4]))[0], expected.detach().double())
    assert text_model(built("gpt2")).most_positions == 32 and text_model(built("llama")).most_positions == 64


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2"])
def test_scaled_embeddings_are_refused_instead_of_attacked_wrongly(kind: str) -> None:
    config = getattr(library, f"{kind}Config")(**_ROTARY, head_dim=4)
    with torch.random.fork_rng(devices=[]):
        model = getattr(library, f"{kind}ForCausalLM")(config)
    with pytest.raises(InvalidArgument, match="give the attack architecture=, a subclass of TextModel"):
        text_model(model)


class _Scaled(Llama):
    """Gemma as a user would write it: embeddings times the root of the width, norms by one plus their weight."""

    def first_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        norm = self.root.layers[0].input_layernorm
        rows = self.embedding.weight.detach()[tokens].double() * self.width**0.5
        scale = (rows.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        found: Tensor = rows * scale * (1 + norm.weight.detach().double())
        return found


def test_an_architecture_of_the_users_own() -> None:
    with torch.random.fork_rng(devices=[]):
        model = library.GemmaForCausalLM(library.GemmaConfig(**_ROTARY, head_dim=4))
    seen = text_model(model, _Scaled)
    tokens, mask = batch()
    given = captured(model, seen.block(0).module, tokens, mask)
    torch.testing.assert_close(seen.first_inputs(tokens[0], torch.arange(7)), given[0].double(), rtol=1e-4, atol=1e-4)


def test_what_is_no_text_model_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"Sequential contains no transformer of a known kind \(Encoder, GPT2"):
        text_model(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InvalidArgument, match="give the attack architecture="):
        text_model(built("llama"), GPT2)
