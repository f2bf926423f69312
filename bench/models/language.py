"""Models of text; the names in their configurations are those of config.json."""

from __future__ import annotations

from .layers import Layers, Model


def bert(
    vocab_size: int,
    max_position_embeddings: int,
    type_vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    intermediate_size: int,
) -> Layers:
    """With pooler, without a head: the embeddings of tokens are shared with nothing."""
    layers = Layers()
    for name, rows in (("word", vocab_size), ("position", max_position_embeddings), ("type", type_vocab_size)):
        layers[f"embeddings.{name}"] = (rows, hidden_size)
    layers.norm("embeddings.norm", hidden_size)
    for layer in range(num_hidden_layers):
        for name in ("query", "key", "value", "output"):
            layers.linear(f"layer{layer}.{name}", hidden_size, hidden_size)
        layers.norm(f"layer{layer}.attention_norm", hidden_size)
        layers.linear(f"layer{layer}.up", hidden_size, intermediate_size)
        layers.linear(f"layer{layer}.down", intermediate_size, hidden_size)
        layers.norm(f"layer{layer}.norm", hidden_size)
    layers.linear("pooler", hidden_size, hidden_size)
    return layers


def gpt2(vocab_size: int, n_positions: int, n_embd: int, n_layer: int) -> Layers:
    """The head is the embedding of tokens, which is there once."""
    layers = Layers()

    def linear(name: str, inputs: int, outputs: int) -> None:  # the other way round than elsewhere: rows are inputs
        layers[f"{name}.weight"] = (inputs, outputs)
        layers[f"{name}.bias"] = (outputs,)

    layers["embeddings.word"] = (vocab_size, n_embd)
    layers["embeddings.position"] = (n_positions, n_embd)
    for layer in range(n_layer):
        layers.norm(f"layer{layer}.attention_norm", n_embd)
        linear(f"layer{layer}.query_key_value", n_embd, 3 * n_embd)
        linear(f"layer{layer}.output", n_embd, n_embd)
        layers.norm(f"layer{layer}.norm", n_embd)
        linear(f"layer{layer}.up", n_embd, 4 * n_embd)
        linear(f"layer{layer}.down", 4 * n_embd, n_embd)
    layers.norm("norm", n_embd)
    return layers


def llama(
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    ranks: int = 1,
) -> Layers:
    """What the first of ``ranks`` holds: FSDP2 cuts dimension 0 of each array. No biases, and a head of its own."""
    layers = Layers()

    def linear(name: str, inputs: int, outputs: int) -> None:
        layers.linear(name, inputs, outputs, bias=False)

    keys = hidden_size // num_attention_heads * num_key_value_heads
    layers["embeddings.weight"] = (vocab_size, hidden_size)
    for layer in range(num_hidden_layers):
        layers[f"layer{layer}.attention_norm.weight"] = (hidden_size,)
        linear(f"layer{layer}.query", hidden_size, hidden_size)
        linear(f"layer{layer}.key", hidden_size, keys)
        linear(f"layer{layer}.value", hidden_size, keys)
        linear(f"layer{layer}.output", hidden_size, hidden_size)
        layers[f"layer{layer}.norm.weight"] = (hidden_size,)
        linear(f"layer{layer}.gate", hidden_size, intermediate_size)
        linear(f"layer{layer}.up", hidden_size, intermediate_size)
        linear(f"layer{layer}.down", intermediate_size, hidden_size)
    layers["norm.weight"] = (hidden_size,)
    linear("head", hidden_size, vocab_size)
    return Layers({name: (-(-rows // ranks), *rest) for name, (rows, *rest) in layers.items()})


BERT = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
GPT2 = {"vocab_size": 50257, "n_positions": 1024}

MODELS = {
    "bert-base": Model(
        "Devlin et al. 2018, arXiv:1810.04805, section 3; config.json of google-bert/bert-base-uncased",
        bert,
        BERT | {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    ),
    "bert-large": Model(
        "Devlin et al. 2018, arXiv:1810.04805, section 3; config.json of google-bert/bert-large-uncased",
        bert,
        BERT | {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
    ),
    "gpt2": Model(
        "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, Table 2; "
        "config.json of openai-community/gpt2",
        gpt2,
        GPT2 | {"n_embd": 768, "n_layer": 12},
    ),
    "gpt2-xl": Model(
        "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, Table 2; "
        "config.json of openai-community/gpt2-xl",
        gpt2,
        GPT2 | {"n_embd": 1600, "n_layer": 48},
    ),
    "llama3-8b-shard": Model(
        "Grattafiori et al. 2024, arXiv:2407.21783, Table 3; config.json of meta-llama/Meta-Llama-3-8B; "
        "an eighth, as on the first of 8 ranks",
        llama,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "ranks": 8,
        },
    ),
}
