"""GPT-2: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

Parameters have the names and shapes of Hugging Face's GPT2LMHeadModel, so that its weights load.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1D(nn.Module):
    """A linear layer whose weight is (inputs, outputs): the layout of GPT-2's files.

    Input (..., inputs) float; output (..., outputs).

    Args:
        inputs: size of the last axis of the input.
        outputs: size of the last axis of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight.t(), self.bias)  # t() is a view: nothing is copied


class Attention(nn.Module):
    """Causal self-attention with several heads.

    Input and output (N, T, width) float.

    Args:
        heads: number of heads; divides `width`.
        width: size of a token's vector.
        dropout: probability of dropping an attention weight, and an element of the output.
    """

    def __init__(self, heads: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.c_attn = Conv1D(width, 3 * width)
        self.c_proj = Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to (N, T, width); a token sees itself and those before it."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, width / heads)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = self.c_proj(x.transpose(1, 2).flatten(2))  # (N, T, width)
        return F.dropout(x, self.dropout, self.training)


class Feedforward(nn.Module):
    """Two linear layers with GELU between them; the inner one is four times as wide.

    Input and output (N, T, width) float.

    Args:
        width: size of a token's vector.
        dropout: probability of dropping an element of the output.
    """

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Conv1D(width, 4 * width)
        self.c_proj = Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to (N, T, width), each token separately."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2 was trained with the approximation
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Decoder layer: attention and a feedforward net, each normalised first and added.

    Input and output (N, T, width) float.

    Args:
        heads: number of heads; divides `width`.
        width: size of a token's vector.
        dropout: probability of dropping, in the attention and on both outputs.
    """

    def __init__(self, heads: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(heads, width, dropout)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = Feedforward(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to (N, T, width)."""
        x = x + self.attn(self.ln_1(x))
        update: Tensor = self.mlp(self.ln_2(x))
        return x + update


class Decoder(nn.Module):
    """Token and position embeddings, the blocks, and the last normalisation.

    Input (N, T) int64; output (N, T, width) float. The arguments are those of `GPT`.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(heads, width, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) to vectors (N, T, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.dropout, self.training)
        for block in self.h:
            x = block(x)
        vectors: Tensor = self.ln_f(x)
        return vectors


class GPT(nn.Module):
    """A decoder of GPT-2's architecture; (50257, 1024, 12, 12, 768) is GPT-2 small, 124 M.

    Input (N, T) int64 with T <= context; output (N, T, vocabulary): logits of the next token. The
    output layer and the token embedding are one parameter, under two names in the state dict.
    Weights start normal with standard deviation 0.02, divided by sqrt(2 * layers) where a block
    adds to the residual path.

    Args:
        vocabulary: number of tokens.
        context: the most tokens the model sees at once.
        layers: number of blocks.
        heads: attention heads of a block; divides `width`.
        width: size of a token's vector.
        dropout: probability of dropping: embeddings, attention weights, the blocks' outputs.

    Raises:
        ValueError: a size is below 1, `heads` does not divide `width`, or `dropout` is not
            in [0, 1).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "vocabulary": vocabulary, "context": context, "layers": layers, "heads": heads,
            "width": width,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be >= 1")
        if width % heads:
            raise ValueError(
                f"width={width} is not a multiple of heads={heads}; change one of them"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be >= 0 and < 1")
        self.context = context
        self.transformer = Decoder(vocabulary, context, layers, heads, width, dropout)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (Attention, Feedforward)):
                nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) to logits (N, T, vocabulary); those at t are of the token t + 1.

        Raises:
            ValueError: there are more than `context` tokens.
        """
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens, but context={self.context}; give fewer, or build the "
                "model with a longer context"
            )
        logits: Tensor = self.lm_head(self.transformer(tokens))
        return logits

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `tokens` (N, T) with `count` sampled tokens after them: (N, T + count) int64.

        Dropout is off meanwhile. Of a text longer than the context the model sees the end.

        Args:
            tokens: int64, T >= 1.
            count: how many tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among this many most likely tokens; None is all of them.
            generator: source of the random numbers, on the device of `tokens`.

        Raises:
            ValueError: `tokens` is empty, or an argument is out of range.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens are {list(tokens.shape)}, but must be (N, T) with T >= 1")
        if count < 0:
            raise ValueError(f"count={count} must be >= 0")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be >= 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be >= 1, or None for all tokens")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for _ in range(count):
                logits = self(tokens[:, -self.context :])[:, -1]  # (N, vocabulary)
                following = _sample(logits, temperature, top_k, generator)
                tokens = torch.cat([tokens, following], dim=1)
        finally:
            for module, training in modes:  # not train(): a frozen part may be in evaluation
                module.training = training
        return tokens


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Return one token (N, 1) for each row of the logits (N, vocabulary)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    vocabulary = logits.shape[-1]
    values, tokens = logits.topk(min(top_k or vocabulary, vocabulary))
    # In float32: half precision rounds away the small ones of many probabilities.
    chances = F.softmax(values.float() / temperature, dim=-1)
    return tokens.gather(1, torch.multinomial(chances, 1, generator=generator))
