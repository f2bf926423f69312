"""The shapes of real models: as derived, with the published totals, and those of other people's code."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from bench import models
from bench.models import MODELS, derive, shapes

# Parameters and arrays. The former are published with checkpoints (torchvision's table of weights, for example).
PUBLISHED = {
    "resnet50": (25_557_032, 161), "mobilenet-v3-large": (5_483_032, 174), "efficientnet-b0": (5_288_548, 213),
    "vit-b16": (86_567_656, 200), "bert-base": (109_482_240, 199), "bert-large": (335_141_888, 391),
    "gpt2": (124_439_808, 148), "gpt2-xl": (1_557_611_200, 580), "llama3-8b-shard": (8_030_261_248 // 8, 291),
}  # fmt: skip


def elements(name):
    return sum(map(math.prod, shapes(name).values()))


def file_of(name):
    return Path(models.__file__).parent / f"{name}.json"


def test_every_model_has_a_file_a_derivation_and_a_published_total():
    assert MODELS == tuple(derive.MODELS) == tuple(PUBLISHED)
    assert {file.stem for file in Path(models.__file__).parent.glob("*.json")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_totals_are_the_published_ones(name):
    assert (elements(name), len(shapes(name))) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_small_and_says_where_its_numbers_come_from(name):
    assert file_of(name).stat().st_size < 40_000
    model = json.loads(file_of(name).read_text())
    assert list(model) == ["source", "config", "parameters", "shapes"]
    assert "arXiv:" in model["source"] or "config.json of " in model["source"]
    assert model["parameters"] == elements(name)
    assert all(shape and all(type(size) is int and size > 0 for size in shape) for shape in shapes(name).values())


def test_an_eighth_of_llama_is_an_eighth_of_every_array():
    model = derive.MODELS["llama3-8b-shard"]
    whole = model.architecture(**{**model.config, "ranks": 1})
    assert sum(map(math.prod, whole.values())) == 8_030_261_248
    shard = shapes("llama3-8b-shard")
    assert {name: (8 * rows, *rest) for name, (rows, *rest) in shard.items()} == whole


def test_the_files_are_what_is_derived():
    assert derive.main(["--check"]) == 0


def test_check_names_the_file_that_differs(tmp_path, capsys):
    assert derive.main([], tmp_path) == 0
    assert derive.main(["--check"], tmp_path) == 0
    file = tmp_path / "gpt2.json"
    file.write_text(file.read_text().replace("50257", "50304", 1))
    (tmp_path / "resnet50.json").unlink()
    assert derive.main(["--check"], tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == ["resnet50.json", "gpt2.json"]
    assert "50304" in file.read_text()  # --check writes nothing


# --- the same models in other people's code, if it is installed ------------------------------------------------------


# The classes of model and configuration, and the options in which the model differs from the latter's defaults.
TRANSFORMERS = {
    "resnet50": ("ResNetForImageClassification", "ResNetConfig", {"num_labels": 1000}),
    "efficientnet-b0": ("EfficientNetForImageClassification", "EfficientNetConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "num_labels": 1000}),
    "vit-b16": ("ViTForImageClassification", "ViTConfig", {"num_labels": 1000}),
    "bert-base": ("BertModel", "BertConfig", {}),
    "bert-large": ("BertModel", "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "gpt2-xl": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama3-8b-shard": ("LlamaForCausalLM", "LlamaConfig",
        {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_shapes_are_those_of_transformers(name):
    transformers, torch = map(pytest.importorskip, ("transformers", "torch"))
    model, config, options = TRANSFORMERS[name]
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
    ranks = derive.MODELS[name].config.get("ranks", 1)
    theirs = Counter(tuple(parameter.shape) for parameter in built.parameters())
    assert Counter((ranks * rows, *rest) for rows, *rest in shapes(name).values()) == theirs
