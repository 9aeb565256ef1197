"""Known shapes add up to the published parameter counts; what is unknown is refused."""

from __future__ import annotations

import math

import pytest

from npr_megatron.errors import ConfigError
from npr_megatron.planning.models import KNOWN_MODELS, model_of
from npr_megatron.weights.names import canonical_parameters

# as the metadata of the safetensors files on the hub say
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_shapes_add_up_to_the_published_parameter_count(name):
    parameters = canonical_parameters(model_of(name))
    assert sum(math.prod(parameter.shape) for parameter in parameters) == PUBLISHED[name]


def test_names_are_found_in_any_case():
    assert model_of("Qwen3-235B-A22B") is KNOWN_MODELS["qwen3-235b-a22b"]


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known_ones():
    with pytest.raises(ConfigError, match=r"did you mean qwen3-4b\?.*qwen3-235b-a22b.*config.json"):
        model_of("qwen3-4")
