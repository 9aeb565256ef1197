"""What the plugin asks of SGLang, without SGLang."""

import pytest

from npr_megatron.engine.sglang.scheduler import support

GOOD = {
    "page_size": 1,
    "disable_radix_cache": False,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_lora": None,
    "pp_size": 1,
    "an option of no concern": 5,
}


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23", "0.5.23.post1"])
def test_known_versions(version):
    assert support.version_problems(version) == []


@pytest.mark.parametrize("version", ["0.5.21", "0.5.24", "0.6.0", "1.0", "0.5.24.post1"])
def test_other_versions_are_refused_by_number(version):
    (problem,) = support.version_problems(version)
    assert version in problem
    assert "0.5.22" in problem


def test_options_that_are_off_may_be_off_in_either_way():
    assert support.option_problems(GOOD) == []
    assert support.option_problems(GOOD | {"enable_lora": False}) == []
    assert support.option_problems({}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 16),
        ("disable_radix_cache", True),
        ("speculative_algorithm", "EAGLE"),
        ("disaggregation_mode", "prefill"),
        ("enable_hierarchical_cache", True),
        ("enable_streaming_session", True),
        ("enable_lora", True),
        ("enable_dp_attention", True),
        ("pp_size", 2),
    ],
)
def test_an_option_in_the_way_is_refused_by_name(name, value):
    (problem,) = support.option_problems(GOOD | {name: value})
    assert problem.startswith(f"{name} is {value!r}")


def test_options_are_read_whatever_keeps_them():
    class Slotted:
        __slots__ = ("page_size", "port", "pp_size")

    args = Slotted()
    args.page_size, args.pp_size, args.port = 16, 1, 30000
    assert support.options_of(args) == {"page_size": 16, "pp_size": 1}


def test_all_options_in_the_way_are_said_at_once():
    problems = support.option_problems(GOOD | {"page_size": 16, "pp_size": 2})
    assert [problem.split()[0] for problem in problems] == ["page_size", "pp_size"]


def test_what_a_model_has_that_cannot_be_joined():
    (problem,) = support.model_problems({"sliding-window layers": True, "sparse attention": False})
    assert "sliding-window layers" in problem


def test_missing_attributes_are_named_with_their_owner():
    owners = {"a.B": {"x", "y"}, "a.C": None}
    wanted = {"a.B": ["x", "z"], "a.C": ["q"]}
    assert support.attribute_problems(wanted, owners.get) == [
        "SGLang's a.B has no z",
        "SGLang has no a.C",
    ]


def test_attributes_are_those_of_the_class_its_fields_and_what_its_initialiser_sets():
    names = support.attributes_of("npr_megatron.engine.sglang.scheduler.leases.Leases")
    assert names is not None
    assert {"hold", "_timeout_s"} <= names
    assert "gone" not in names
    fields = support.attributes_of("npr_megatron.engine.sglang.stage.Draw")
    assert fields is not None
    assert "first_index" in fields
    assert support.attributes_of("npr_megatron.engine.sglang.scheduler.leases.Gone") is None
    assert support.attributes_of("npr_megatron.gone") is None
