"""config.json of published models: what is read, what is refused, and by which of the readers."""

from __future__ import annotations

import json

import pytest

from npr_megatron.config.hf_architecture import (
    not_computed,
    read_architecture,
    read_trainable_architecture,
)
from npr_megatron.config.model import ModelConfig, MoeConfig, RopeScaling
from npr_megatron.errors import InputError
from tests.unit.config.hf_folders import (
    GLM_4_6,
    LLAMA_8B,
    QWEN3_4B,
    QWEN3_30B,
    write_config,
    write_qwen3,
)

EXPECTED_4B = ModelConfig(
    num_hidden_layers=36,
    hidden_size=2560,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9728,
    vocab_size=151936,
    rope_theta=5e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=262144,
)


@pytest.mark.parametrize("read", [read_architecture, read_trainable_architecture])
def test_rotary_settings_are_read_flat_and_as_transformers_5_writes_them(tmp_path, read):
    assert read(write_qwen3(tmp_path)) == EXPECTED_4B
    rope = {"rope_theta": 5e6, "rope_type": "default"}
    assert read(write_config(tmp_path, QWEN3_4B, "rope_theta", rope_parameters=rope)) == EXPECTED_4B


def test_experts_of_qwen_are_read_under_both_names_that_transformers_gave_them(tmp_path):
    model = read_architecture(write_config(tmp_path, QWEN3_30B))
    assert model.moe == MoeConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    assert (model.family, model.has_qk_norm, model.rope_theta) == ("qwen3_moe", True, 1e6)
    renamed = write_config(tmp_path, QWEN3_30B, "num_experts", num_local_experts=128)
    assert read_architecture(renamed) == model
    dense_first = read_architecture(write_config(tmp_path, QWEN3_30B, mlp_only_layers=[0, 1]))
    assert dense_first.moe is not None
    assert dense_first.moe.num_dense_layers == 2


def test_llama_has_no_head_norms_and_its_head_dim_may_be_left_out(tmp_path):
    model = read_architecture(write_config(tmp_path, LLAMA_8B))
    assert (model.family, model.has_qk_norm, model.head_dim) == ("llama", False, 128)
    assert model.moe is None


@pytest.mark.parametrize("read", [read_architecture, read_trainable_architecture])
def test_the_stretch_of_llama_3_is_read_under_both_names_that_transformers_gave_it(tmp_path, read):
    model = read(write_config(tmp_path, LLAMA_8B))
    assert model.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    rope = {"rope_theta": 5e5, **LLAMA_8B["rope_scaling"]}
    renamed = write_config(tmp_path, LLAMA_8B, "rope_theta", "rope_scaling", rope_parameters=rope)
    assert read(renamed) == model


def test_a_stretch_without_its_numbers_is_refused(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "low"}
    with pytest.raises(InputError) as caught:
        read_trainable_architecture(write_config(tmp_path, LLAMA_8B, rope_scaling=rope))
    for part in ("high_freq_factor is missing", 'low_freq_factor cannot be "low"'):
        assert part in str(caught.value)


def test_glm_counts_shared_experts_and_dense_layers(tmp_path):
    model = read_architecture(write_config(tmp_path, GLM_4_6, n_shared_experts=2))
    assert model.moe == MoeConfig(
        num_experts=160,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        num_dense_layers=3,
        shared_intermediate_size=3072,
        has_expert_bias=True,
    )
    assert model.has_qk_norm
    assert not read_architecture(write_config(tmp_path, GLM_4_6, "use_qk_norm")).has_qk_norm


def test_a_key_that_hf_leaves_out_means_what_hf_means(tmp_path):
    assert not read_architecture(
        write_config(tmp_path, QWEN3_4B, "tie_word_embeddings")
    ).tie_word_embeddings
    glm = write_config(tmp_path, GLM_4_6, "rms_norm_eps", "first_k_dense_replace")
    model = read_architecture(glm)
    assert model.moe is not None
    assert (model.rms_norm_eps, model.moe.num_dense_layers) == (1e-5, 1)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (QWEN3_4B, {"architectures": ["GPT2LMHeadModel"]}, 'architectures is ["GPT2LMHeadModel"]'),
        (QWEN3_4B, {"attention_bias": True}, "attention_bias is true, supported is false"),
        (LLAMA_8B, {"mlp_bias": True}, "mlp_bias is true"),
        (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, supported is 1"),
        (QWEN3_30B, {"mlp_only_layers": [3]}, "mlp_only_layers is [3]"),
        (QWEN3_30B, {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        (QWEN3_4B, {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        (GLM_4_6, {"n_routed_experts": 0}, "n_routed_experts cannot be 0"),
        (QWEN3_4B, {"hidden_size": "wide"}, 'hidden_size cannot be "wide"'),
    ],
)
def test_weights_without_a_layout_are_refused_by_name(tmp_path, config, changes, reason):
    with pytest.raises(InputError, match="no model whose weights can be laid out") as caught:
        read_architecture(write_config(tmp_path, config, **changes))
    assert reason in str(caught.value)


def test_weights_in_fp8_blocks_are_read_and_other_blocks_refused(tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = write_config(tmp_path, QWEN3_4B, quantization_config=fp8)
    assert read_architecture(folder) == EXPECTED_4B
    folder = write_config(
        tmp_path, QWEN3_4B, quantization_config={**fp8, "weight_block_size": [64, 64]}
    )
    with pytest.raises(InputError, match="quantization_config is"):
        read_architecture(folder)


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "n_routed_experts"])
def test_missing_keys_are_named_as_the_file_names_them(tmp_path, missing):
    with pytest.raises(InputError, match=f"{missing} is missing"):
        read_architecture(write_config(tmp_path, GLM_4_6, missing, "head_dim"))


@pytest.mark.parametrize("config", [QWEN3_4B, QWEN3_30B, LLAMA_8B])
def test_models_that_are_trained_are_read_alike_by_both_readers(tmp_path, config):
    folder = write_config(tmp_path, config)
    assert read_trainable_architecture(folder) == read_architecture(folder)


def test_models_with_a_layout_only_are_not_trained(tmp_path):
    read_architecture(write_config(tmp_path, GLM_4_6))
    with pytest.raises(InputError, match=r'supported is .* or \["LlamaForCausalLM"\]'):
        read_trainable_architecture(tmp_path)


def test_models_that_cannot_be_trained_are_refused_with_every_reason(tmp_path):
    folder = write_qwen3(
        tmp_path,
        architectures=["MistralForCausalLM"],
        vocab_size=0,
        attention_bias=True,
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
    )
    with pytest.raises(InputError) as caught:
        read_trainable_architecture(folder)
    for part in (
        'architectures is ["MistralForCausalLM"], supported is ["Qwen3ForCausalLM"] or',
        "vocab_size cannot be 0",
        "attention_bias is true",
        'rope_type is "yarn"',
    ):
        assert part in str(caught.value)


def test_what_is_not_computed_says_nothing_about_weights():
    assert not_computed(QWEN3_4B) == not_computed({**QWEN3_4B, "attention_bias": True}) == []
    assert not_computed({"use_sliding_window": True, "hidden_act": "gelu"}) == [
        'hidden_act is "gelu", supported is "silu"',
        "use_sliding_window is true, supported is false",
    ]
    by_layer = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}
    assert not_computed(by_layer) == [
        'rope settings by layer is ["full_attention"], supported is []'
    ]
    assert not_computed({"partial_rotary_factor": 0.5}) == [
        "partial_rotary_factor is 0.5, supported is 1.0"
    ]


@pytest.mark.parametrize("left_out", [True, False])
def test_experts_whose_weights_do_not_sum_to_one_are_refused(left_out):
    changed = {**QWEN3_30B, "norm_topk_prob": False}
    if left_out:
        del changed["norm_topk_prob"]
    assert not_computed(QWEN3_30B) == []
    assert not_computed(changed) == ["norm_topk_prob is false, supported is true"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("n_shared_experts", "one", 'n_shared_experts cannot be "one"'),
        ("n_shared_experts", -1, "n_shared_experts cannot be -1"),
        ("rope_parameters", "yarn", 'rope_parameters is "yarn", supported is a table'),
        ("rope_scaling", 8, "rope_scaling is 8, supported is a table"),
        ("layer_types", 3, "layer types beside full_attention is 3"),
        ("layer_types", [["sliding"]], 'layer types beside full_attention is [["sliding"]]'),
    ],
)
def test_values_of_a_wrong_kind_are_refused_too(tmp_path, key, value, reason):
    reader = read_architecture if key == "n_shared_experts" else read_trainable_architecture
    config = GLM_4_6 if key == "n_shared_experts" else QWEN3_4B
    with pytest.raises(InputError) as caught:
        reader(write_config(tmp_path, config, **{key: value}))
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", json.dumps("x")])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="download it again"):
        read_architecture(tmp_path)
