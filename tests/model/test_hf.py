import dataclasses
import itertools
import json
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture, RopeScaling
from minitron.model.weights import SINGLE_FILE, WeightWriter
from tests.tiny import LLAMA3_ROPE, VARIANTS, logits, random_llama, save_llama, tiny_config

ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
SMALL = hf.architecture_from_config(tiny_config().to_dict())


def random_architecture(generator):
    groups = generator.choice([1, 2, 3])
    heads = groups * generator.choice([1, 2, 4])
    return Architecture(
        num_layers=generator.randint(1, 3),
        hidden_size=heads * generator.randint(1, 5),
        ffn_hidden_size=generator.randint(1, 40),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=2 * generator.randint(1, 6),
        vocab_size=generator.randint(1, 50),
        max_position_embeddings=generator.choice([64, 8192]),
        share_embeddings_and_output_weights=generator.random() < 0.5,
        add_qkv_bias=generator.random() < 0.5,
        add_mlp_bias=generator.random() < 0.5,
        layernorm_epsilon=generator.choice([1e-5, 1e-6]),
        rotary_base=generator.choice([10000.0, 500000.0]),
        rope_scaling=generator.choice([None, RopeScaling(), RopeScaling(factor=32.0)]),
    )


ARCHITECTURES = [random_architecture(random.Random(seed)) for seed in range(12)]


def build_hf(arch):
    """The transformers model that our config.json of `arch` describes."""
    config = LlamaConfig(**hf.config_from_architecture(arch, dtype=torch.float32))
    return LlamaForCausalLM(config)


# The table of tensors.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_are_those_of_transformers(arch):
    state = build_hf(arch).state_dict()
    if arch.share_embeddings_and_output_weights:
        del state[hf.LM_HEAD]
    infos = hf.tensor_infos(arch, torch.float32)
    assert {n: i.shape for n, i in infos.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert sum(i.num_bytes for i in infos.values()) == 4 * arch.num_parameters


def test_layer_names_split_as_they_were_joined():
    assert hf.split_layer_tensor("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert hf.split_layer_tensor(hf.EMBEDDING) == (None, hf.EMBEDDING)
    for name in hf.tensor_axes(ARCHITECTURES[0]):
        layer, suffix = hf.split_layer_tensor(name)
        assert name == (suffix if layer is None else hf.layer_tensor(layer, suffix))


# config.json, both ways.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_round_trip(arch):
    config = hf.config_from_architecture(arch, dtype=torch.bfloat16)
    assert hf.architecture_from_config(json.loads(json.dumps(config))) == arch


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_either_spelling_of_rope_alone_says_the_same(arch):
    config = hf.config_from_architecture(arch, dtype=torch.bfloat16)
    version_4 = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    version_5 = {k: v for k, v in config.items() if k not in (*ROPE[:2], "torch_dtype")}
    assert hf.architecture_from_config(version_4) == arch
    assert hf.architecture_from_config(version_5) == arch
    parsed = [LlamaConfig(**c) for c in (config, version_4, version_5)]
    assert parsed[0].rope_parameters == parsed[1].rope_parameters == parsed[2].rope_parameters
    assert parsed[0].dtype == parsed[1].dtype == parsed[2].dtype == torch.bfloat16


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_transformers_reads_the_config_it_would_have_written(tmp_path, overrides):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    arch = hf.read_architecture(tmp_path)
    (tmp_path / "ours").mkdir()
    hf.write_config(tmp_path / "ours", arch, dtype=torch.float32, base_dir=tmp_path)
    ours = LlamaConfig.from_pretrained(tmp_path / "ours")
    differing = {
        key
        for key in config.to_dict() | ours.to_dict()
        if config.to_dict().get(key) != ours.to_dict().get(key)
    }
    assert differing <= {"architectures", "dtype", "transformers_version"}
    expected, found = (LlamaRotaryEmbedding(c).inv_freq for c in (config, ours))
    assert torch.equal(expected, found)


def test_llama_31_rope_in_the_spelling_of_transformers_4():
    """The keys of the published config.json of Llama-3.1-8B."""
    config = tiny_config(head_dim=16).to_dict()
    for key in ROPE:
        config.pop(key, None)
    config["rope_theta"] = 500000.0
    config["rope_scaling"] = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    arch = hf.architecture_from_config(config)
    assert arch.rotary_base == 500000.0
    assert arch.rope_scaling == RopeScaling()
    written = hf.config_from_architecture(arch, dtype=torch.bfloat16)
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == config["rope_scaling"]
    assert written["rope_parameters"] == config["rope_scaling"] | {"rope_theta": 500000.0}
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("old", "new"),
    itertools.product(
        [None, {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"} | {"factor": 2.0}],
        [None, LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 77.0}],
    ),
)
def test_contradicting_spellings_resolve_as_in_transformers(old, new):
    config = {k: v for k, v in tiny_config().to_dict().items() if k not in ROPE}
    config |= {"rope_theta": 1234.0, "rope_scaling": old, "rope_parameters": new}
    parsed = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    arch = hf.architecture_from_config(config)
    assert arch.rotary_base == parsed["rope_theta"]
    found = arch.rope_scaling.factor if arch.rope_scaling else None
    assert found == parsed.get("factor")


def test_defaults_are_those_of_transformers():
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: getattr(tiny_config(), name) for name in (*names, "vocab_size")}
    expected = hf.architecture_from_config(LlamaConfig(**config).to_dict())
    assert hf.architecture_from_config(config) == expected
    assert expected.num_query_groups == 8
    assert expected.kv_channels == 4


def test_keys_that_the_shape_does_not_decide_are_kept():
    base = tiny_config(initializer_range=0.5).to_dict() | {"custom": [1], "hidden_size": 999}
    config = hf.config_from_architecture(SMALL, dtype=torch.float16, base=base)
    assert config["eos_token_id"] == [2, 7]
    assert config["initializer_range"] == 0.5
    assert config["custom"] == [1]
    assert config["hidden_size"] == 32
    assert config["head_dim"] == 4
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not supported; only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantised"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type 'linear' is not"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks the key 'factor'"),
        ({"rope_scaling": "llama3"}, "holds a value of the wrong type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"hidden_size": "32"}, "hidden_size='32' must be a whole number"),
        ({"hidden_size": "32", "head_dim": None}, "holds a value of the wrong type"),
        ({"rope_parameters": {"rope_theta": "big"}}, "holds a value of the wrong type"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of"),
        ({"num_hidden_layers": ...}, "lacks the key 'num_hidden_layers'"),
    ],
)
def test_unsupported_config(tmp_path, changes, message):
    config = tiny_config().to_dict() | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / hf.CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(MinitronError, match=message) as caught:
        hf.read_architecture(tmp_path)
    assert str(tmp_path / hf.CONFIG_FILE) in str(caught.value)


def test_config_that_cannot_be_read(tmp_path):
    with pytest.raises(MinitronError, match="absent is not a directory; give a Hugging Face"):
        hf.read_architecture(tmp_path / "absent")
    with pytest.raises(MinitronError, match=r"has no config.json; give a Hugging Face"):
        hf.read_architecture(tmp_path)
    (tmp_path / hf.CONFIG_FILE).write_text("[]")
    with pytest.raises(MinitronError, match="wrong type"):
        hf.read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("hidden", "choices"), [(30, "choose 24 or 32"), (9, "choose 8 or 16"), (5, "choose 8")]
)
def test_shape_that_transformers_refuses(hidden, choices):
    arch = dataclasses.replace(SMALL, hidden_size=hidden)
    with pytest.raises(MinitronError, match=f"hidden_size={hidden} is not .*heads=8, .*{choices}$"):
        hf.config_from_architecture(arch, dtype=torch.float32)
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):
        tiny_config(hidden_size=hidden, head_dim=4)


# A model directory.


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    for directory in (base, out):
        directory.mkdir()
    (base / hf.CONFIG_FILE).write_text(json.dumps(tiny_config().to_dict()))
    for name in hf.COPIED_FILES:
        (base / name).write_bytes(f"\r\n\xff{name}".encode("latin-1"))
    (base / "README.md").write_text("not the tokenizer's")
    hf.write_config(out, SMALL, dtype=torch.float32, base_dir=base)
    assert {p.name for p in out.iterdir()} == {hf.CONFIG_FILE, *hf.COPIED_FILES}
    assert all((out / n).read_bytes() == (base / n).read_bytes() for n in hf.COPIED_FILES)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_directories_of_transformers_open(tmp_path, overrides, shard):
    model = save_llama(tmp_path, shard=shard, **overrides)
    arch = hf.read_architecture(tmp_path)
    reader = hf.open_weights(tmp_path, arch)
    state = model.state_dict()
    for name in hf.tensor_axes(arch):
        assert torch.equal(reader.read(name), state[name])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_our_directories_open_in_transformers(tmp_path, overrides):
    model = random_llama(tiny_config(**overrides))
    arch = hf.architecture_from_config(model.config.to_dict())
    hf.write_config(tmp_path, arch, dtype=torch.float32)
    writer = WeightWriter(tmp_path, hf.tensor_infos(arch, torch.float32))
    writer.create()
    for name in hf.tensor_axes(arch):
        writer.write(name, model.state_dict()[name])
    writer.close()
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(loaded), logits(model))


def edit_weights(directory, **changes):
    """Replace tensors of a single-file directory; `__` stands for a dot, None deletes."""
    tensors = load_file(directory / SINGLE_FILE)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, directory / SINGLE_FILE)
    return tensors


def open_model(directory):
    return hf.open_weights(directory, hf.read_architecture(directory))


def test_missing_tensor(tmp_path):
    save_llama(tmp_path)
    edit_weights(tmp_path, model__norm__weight=None)
    with pytest.raises(MinitronError, match=r"lacks the tensor model\.norm\.weight; restore it"):
        open_model(tmp_path)


def test_untied_model_without_a_head(tmp_path):
    """transformers would warn and go on with a random head."""
    save_llama(tmp_path)
    edit_weights(tmp_path, lm_head__weight=None)
    with pytest.raises(MinitronError, match=r"lacks .* lm_head\.weight; set tie_word_embeddings"):
        open_model(tmp_path)


def test_tensor_of_another_shape(tmp_path):
    save_llama(tmp_path)
    edit_weights(tmp_path, model__norm__weight=torch.ones(31))
    with pytest.raises(MinitronError, match=r"norm.weight has shape \[31\], config.json .* \[32\]"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["model__layers__0__self_attn__q_proj__bias", "model__layers__4__mlp__up_proj__weight"]
)
def test_tensor_that_the_config_does_not_know(tmp_path, name):
    """Ignoring it, as transformers does, would silently run another model."""
    save_llama(tmp_path)
    edit_weights(tmp_path, **{name: torch.ones(32)})
    with pytest.raises(MinitronError, match=f"holds {name.replace('__', '.')}, which .* config"):
        open_model(tmp_path)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    save_llama(tmp_path)
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    edit_weights(tmp_path, **{name: torch.ones(2)})
    open_model(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_model_with_a_head_in_its_file(tmp_path, equal):
    """transformers ties only equal tables, and warns otherwise."""
    save_llama(tmp_path, tie_word_embeddings=True)
    table = load_file(tmp_path / SINGLE_FILE)[hf.EMBEDDING]
    head = table.clone()
    head[60, 31] += 0 if equal else 1
    edit_weights(tmp_path, lm_head__weight=head)
    tied = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (tied.lm_head.weight is tied.model.embed_tokens.weight) == equal
    if equal:
        open_model(tmp_path)
    else:
        with pytest.raises(MinitronError, match=r"differs .*; set tie_word_embeddings to false"):
            open_model(tmp_path)
