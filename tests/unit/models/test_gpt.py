"""GPT: GPT-2's names and shapes, a naive computation of the same, sampling, and refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.gpt import GPT, Block

SIZES = {"vocabulary": 11, "context": 8, "layers": 2, "heads": 3, "width": 12}


def small(**changes):
    torch.manual_seed(0)
    return GPT(**SIZES | changes)


def lively(**changes):
    """Return a model whose logits differ much, in float64, biases and scales included."""
    model = small(**changes).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def some_tokens(rows=2, length=7, seed=1):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


def expected(vocabulary, context, layers, width):
    """Return the names and shapes of Hugging Face's files of weights."""
    result = {"transformer.wte.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    result["transformer.wpe.weight"] = (context, width)
    linear = {
        "attn.c_attn": (1, 3),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (1, 4),
        "mlp.c_proj": (4, 1),
    }
    for layer in range(layers):
        prefix = f"transformer.h.{layer}"
        for name, (inputs, outputs) in linear.items():
            result[f"{prefix}.{name}.weight"] = (inputs * width, outputs * width)
            result[f"{prefix}.{name}.bias"] = (outputs * width,)
        for name in ("ln_1", "ln_2"):
            result |= {f"{prefix}.{name}.{part}": (width,) for part in ("weight", "bias")}
    return result | {f"transformer.ln_f.{part}": (width,) for part in ("weight", "bias")}


@pytest.mark.parametrize(("layers", "heads", "width", "parameters"), [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168),
])  # fmt: skip
def test_gpt_names_and_shapes_match_gpt_2(layers, heads, width, parameters):
    with torch.device("meta"):
        model = GPT(50257, 1024, layers, heads, width)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    result = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert result == expected(50257, 1024, layers, width)


def test_gpt_with_hugging_face_weights_gives_the_same_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3)
    reference = transformers.GPT2LMHeadModel(config).eval()
    model = small().eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    tokens = some_tokens()
    torch.testing.assert_close(model(tokens), reference(tokens).logits)


def naive(state, tokens, layers, heads):
    """Compute the logits of one row of tokens, one head and one position at a time."""

    def linear(x, name):
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(x):
        width = x.shape[-1] // 3
        size = width // heads
        rows = []
        for now in range(len(x)):
            parts = []
            for head in range(heads):
                q, k, v = (
                    x[: now + 1, begin + head * size : begin + (head + 1) * size]
                    for begin in (0, width, 2 * width)
                )
                chances = torch.softmax(k @ q[-1] / math.sqrt(size), dim=0)
                parts.append(chances @ v)
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    wte = state["transformer.wte.weight"]
    x = wte[tokens] + state["transformer.wpe.weight"][: len(tokens)]
    for layer in range(layers):
        prefix = f"transformer.h.{layer}"
        h = attend(linear(norm(x, f"{prefix}.ln_1"), f"{prefix}.attn.c_attn"))
        x = x + linear(h, f"{prefix}.attn.c_proj")
        h = gelu(linear(norm(x, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc"))
        x = x + linear(h, f"{prefix}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ wte.T


@pytest.mark.parametrize("heads", [1, 3])
def test_gpt_logits_match_a_naive_computation(heads):
    model = lively(heads=heads)
    tokens = some_tokens()
    by_hand = torch.stack([naive(model.state_dict(), row, 2, heads) for row in tokens])
    assert by_hand.std() > 0.5
    torch.testing.assert_close(model(tokens), by_hand)


@pytest.mark.parametrize("changed", range(7))
def test_gpt_is_causal(changed):
    model = lively()
    tokens = some_tokens()
    others = tokens.clone()
    others[:, changed] = (others[:, changed] + 1) % 11
    before, after = model(tokens), model(others)
    torch.testing.assert_close(after[:, :changed], before[:, :changed])
    for position in range(changed, 7):
        assert not torch.allclose(after[:, position], before[:, position])


def test_gpt_ties_embedding_and_output_layer():
    model = small()
    assert model.lm_head.weight is model.transformer.wte.weight
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert "lm_head.weight" not in dict(model.named_parameters())  # counted once


def test_gpt_initial_weights_match_the_paper():
    model = small(vocabulary=300, context=200, layers=8, heads=2, width=64)
    for name, value in model.named_parameters():
        if "ln_" in name:
            assert bool((value == (1 if name.endswith("weight") else 0)).all()), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.06), name
            assert value.mean().item() == pytest.approx(0, abs=std / 10), name


def test_gpt_untrained_loss_is_uniform():
    tokens = some_tokens(4, 8)
    logits = small()(tokens)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(11), abs=0.05)


def test_gradients_reach_every_parameter():
    model = small(dropout=0.1)
    tokens = some_tokens(4, 8)
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_is_random_in_training_and_off_in_evaluation():
    model = small(dropout=0.3)
    tokens = some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), small().eval()(tokens))


def test_gpt_blocks_are_selected_by_class():
    assert [type(block) for block in small().transformer.h] == [Block, Block]


def test_gpt_transposed_weight_is_a_view():
    layer = small().transformer.h[0].attn.c_attn
    assert layer.weight.t().data_ptr() == layer.weight.data_ptr()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_gpt_exports_with_dynamic_batch_and_length():
    model = lively()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (some_tokens(),), dynamic_shapes=(free,), strict=False)
    tokens = some_tokens(3, 5)
    torch.testing.assert_close(program.module()(tokens), model(tokens))


# --- generate ----------------------------------------------------------------------------------


def generated(model, tokens, count=12, seed=3, **options):
    return model.generate(tokens, count, generator=torch.Generator().manual_seed(seed), **options)


def test_generate_continues_beyond_the_context():
    tokens = some_tokens()
    result = generated(lively(), tokens)
    assert (result.shape, result.dtype) == ((2, 19), torch.int64)
    assert torch.equal(result[:, :7], tokens)
    assert 0 <= result.min() <= result.max() < 11
    assert torch.equal(generated(lively(), tokens, count=0), tokens)


def test_generate_depends_on_its_generator_only():
    model, tokens = lively(dropout=0.5).train(), some_tokens()
    before = torch.get_rng_state()
    first = generated(model, tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generated(model, tokens), first)
    assert not torch.equal(generated(model, tokens, seed=4), first)


def test_generate_at_temperature_zero_is_greedy():
    model, tokens = lively(), some_tokens()
    expected = tokens
    for _ in range(6):
        best = model(expected[:, -8:])[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(model.generate(tokens, 6, temperature=0), expected)
    assert torch.equal(model.generate(tokens, 6, top_k=1), expected)
    assert torch.equal(model.generate(tokens, 6, temperature=1e-6), expected)


def test_generate_samples_follow_the_top_k_softmax():
    model, tokens = lively(), some_tokens(1, 4).expand(20_000, -1)
    logits = model(tokens[:1])[0, -1]
    result = generated(model, tokens, count=1, temperature=2.0, top_k=3)[:, -1]
    values, best = logits.topk(3)
    chances = torch.zeros(11, dtype=torch.float64)
    chances[best] = torch.softmax(values / 2, dim=0)
    shares = torch.bincount(result, minlength=11).double() / len(result)
    torch.testing.assert_close(shares, chances, atol=0.02, rtol=0)
    assert not shares[chances == 0].any()


def test_generate_top_k_above_the_vocabulary_is_all_tokens():
    model, tokens = lively(), some_tokens()
    assert torch.equal(generated(model, tokens, top_k=99), generated(model, tokens))


def test_generate_restores_module_modes_even_after_an_error():
    model = small().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    model.generate(some_tokens(), 2)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[99]]), 1)  # no such token
    assert [module.training for module in model.modules()] == modes


def test_generate_records_no_gradient():
    model = small()
    assert not model.generate(some_tokens(), 1).requires_grad
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "text"), [
    ({"vocabulary": 0}, "vocabulary=0 must be >= 1"),
    ({"context": -1}, "context=-1 must be >= 1"),
    ({"layers": 0}, "layers=0 must be >= 1"),
    ({"heads": 0}, "heads=0 must be >= 1"),
    ({"heads": 5}, "width=12 is not a multiple of heads=5; change one of them"),
    ({"dropout": 1.0}, "dropout=1.0 must be >= 0 and < 1"),
    ({"dropout": -0.1}, "dropout=-0.1 must be"),
])  # fmt: skip
def test_gpt_rejects_impossible_arguments(changes, text):
    with pytest.raises(ValueError, match=text):
        GPT(**SIZES | changes)


def test_gpt_rejects_more_tokens_than_the_context():
    model = small()
    assert model(some_tokens(1, 8)).shape == (1, 8, 11)
    with pytest.raises(ValueError, match="9 tokens, but context=8; give fewer"):
        model(some_tokens(1, 9))


@pytest.mark.parametrize(("arguments", "text"), [
    ((torch.zeros(1, 0, dtype=torch.int64), 1), r"tokens are \[1, 0\], but must be \(N, T\)"),
    ((torch.zeros(3, dtype=torch.int64), 1), r"tokens are \[3\]"),
    ((torch.zeros(1, 1, dtype=torch.int64), -1), "count=-1 must be >= 0"),
    ((torch.zeros(1, 1, dtype=torch.int64), 1, -0.5), "temperature=-0.5 must be >= 0"),
    ((torch.zeros(1, 1, dtype=torch.int64), 1, 1.0, 0), "top_k=0 must be >= 1, or None"),
])  # fmt: skip
def test_generate_rejects_impossible_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        small().generate(*arguments)
