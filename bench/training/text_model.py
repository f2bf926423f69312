"""A small language model on bytes: a decoder-only transformer in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .text_data import VOCABULARY

HEAD = 32
"""Width of an attention head."""


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each after a norm and added to what came in (GPT-2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return values of the same shape, (sequences, places, width)."""
        count, places, width = x.shape
        joined = self.attention_in(self.attention_norm(x)).view(count, places, 3, self.heads, HEAD)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(count, places, width))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_out(hidden)


class Transformer(nn.Module):
    """From bytes to the logits of the byte that follows each of them.

    Args:
        width: Of the residual stream; a multiple of HEAD.
        layers: Number of blocks.
        context: Longest sequence.
        seed: Of the weights: normal with standard deviation 0.02 as in GPT-2, those that write into the residual
            stream smaller by the square root of their number; biases are 0.
    """

    def __init__(self, width: int, layers: int, context: int, seed: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    into_stream = name.endswith(("attention_out.weight", "mlp_out.weight"))
                    scale = 0.02 / (2 * layers) ** 0.5 if into_stream else 0.02
                    parameter.normal_(0.0, scale, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (sequences, places, VOCABULARY)."""
        embedded = self.tokens(x) + self.places.weight[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(embedded)))
        return logits


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per byte, of every byte of the windows after the first."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
