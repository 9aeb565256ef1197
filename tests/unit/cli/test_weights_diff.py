"""``npr weights diff``: equal across formats, and every planted difference in its place."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import StaleWeightsError
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.checkpoints.live_run import LiveRun
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages, load_tiles
from tests.unit.weights.folders import MODELS, QWEN3, UNTIED, convert, hf_tensors, write_hf_folder

K_PROJ = "model.layers.2.self_attn.k_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def changed(folder, name, index, value):
    """Write ``folder`` anew with one other element."""
    tensors = hf_tensors(folder)
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def source(tmp_path):
    return write_hf_folder(tmp_path / "hf", QWEN3)


@pytest.mark.parametrize("family", MODELS)
def test_formats_and_cuts_do_not_matter(npr, family, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS[family])
    there = convert(source, tmp_path / "there", reader_shape=(2, 2, 1))
    result = npr("weights", "diff", str(source), str(there))
    assert result.code == 0
    count, digest_a, digest_b = result.out.splitlines()
    number = len(hf_tensors(source))
    assert count == f"{number} of {number} parameters are equal"
    assert digest_a.split()[-1] == digest_b.split()[-1]


def test_differences_are_listed_in_the_order_of_the_forward_pass(npr, source, tmp_path):
    there = convert(source, tmp_path / "there")
    old = hf_tensors(source)
    changed(source, K_PROJ, (5, 7), old[K_PROJ][5, 7] + 2)
    changed(source, NORM, 3, torch.nan)
    result = npr("weights", "diff", str(there), str(source), "--json")
    assert result.code == 1
    found = json.loads(result.out)
    different = [p for p in found["parameters"] if p["state"] != "equal"]
    assert [(p["parameter"], p["first"]) for p in different] == [(NORM, [3]), (K_PROJ, [5, 7])]
    assert different[0]["max_delta"] == "nan"
    assert different[1]["max_delta"] == pytest.approx(2, abs=1e-6)
    assert found["digest_a"] != found["digest_b"]
    assert not found["equal"]
    table = npr("weights", "diff", str(there), str(source)).out
    assert table.index(NORM) < table.index(K_PROJ)
    assert "[5, 7]" in table


def test_bands_do_not_show(npr, source, tmp_path, monkeypatch):
    there = convert(source, tmp_path / "there")
    old = hf_tensors(source)[K_PROJ]
    changed(source, K_PROJ, (slice(5, 9), 7), old[5:9, 7] + 2)
    arguments = ["weights", "diff", str(source), str(there), "--json"]
    expected = json.loads(npr(*arguments).out)
    monkeypatch.setattr("npr_megatron.weights.checkpoints.comparison.BAND_BYTES", 3 * 4 * 32)
    assert json.loads(npr(*arguments).out) == expected
    assert [p["first"] for p in expected["parameters"] if p["state"] != "equal"] == [[5, 7]]


def test_values_in_another_dtype_are_different_bits(npr, source, tmp_path):
    there = convert(source, tmp_path / "there", dtype="bf16")
    result = npr("weights", "diff", str(source), str(there), "--json")
    assert result.code == 1
    for parameter in json.loads(result.out)["parameters"]:
        assert parameter["note"] == "torch.float32 against torch.bfloat16"
        assert 0 < parameter["max_delta"] < 0.01


def test_parameters_that_one_side_lacks_or_shapes_otherwise(npr, source, tmp_path):
    wider = UNTIED.model_copy(update={"vocab_size": 80})
    other = write_hf_folder(tmp_path / "other", wider)
    found = json.loads(npr("weights", "diff", str(source), str(other), "--json").out)
    states = {p["parameter"]: (p["state"], p["note"]) for p in found["parameters"]}
    assert states["lm_head.weight"] == ("missing in A", "")
    assert states["model.embed_tokens.weight"] == (
        "different",
        "shape [70, 32] against [80, 32]",
    )
    assert found["digest_a"] is None
    assert states[NORM] == ("equal", "")


def test_a_side_that_cannot_be_read_is_neither_equal_nor_different(npr, source, tmp_path):
    result = npr("weights", "diff", str(source), str(tmp_path))
    assert result.code == 2
    assert "is no checkpoint" in result.err


class Run:
    """A run folder and the arenas of its two trainer ranks."""

    def __init__(self, folder, hf_folder) -> None:
        self.folder = folder
        self._parallel = ParallelConfig(tp_size=2)
        layout = trainer_layout(QWEN3, self._parallel)
        self._publishers = [
            Publisher(layout, rank, torch.float32, run_id=folder.name, arena_dir=folder.parent)
            for rank in range(2)
        ]
        self._layout, self._hf_folder = layout, hf_folder
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self._config()))

    def _config(self):
        from npr_megatron.config.loader import load_run
        from tests.unit.cli.test_commands import QUICKSTART

        config = load_run(QUICKSTART, []).model_dump(mode="json")
        config["model"]["architecture"] = QWEN3.model_dump(mode="json")
        config["parallel"] = self._parallel.model_dump(mode="json")
        config["cluster"]["arena_dir"] = str(self.folder.parent)
        return config

    def push(self, version):
        parts = []
        for rank, publisher in enumerate(self._publishers):
            storages = empty_storages(self._layout.ranks[rank], torch.float32)
            load_tiles(self._layout.ranks[rank], read_hf(self._hf_folder, QWEN3).read, storages)
            parts.append(publisher.publish(version, storages))
        return Publication.assemble(parts)

    def say_served(self, version, digest):
        (self.folder / "serving.json").write_text(
            json.dumps({"version": version, "digest": f"{digest:#018x}", "replicas": [0, 1]})
        )

    def close(self):
        for publisher in self._publishers:
            publisher.close()


@pytest.fixture
def run(source, tmp_path):
    run = Run(tmp_path / "run-seed0", source)
    yield run
    run.close()


def test_a_checkpoint_and_a_living_run(npr, source, run):
    arguments = ["weights", "diff", str(source), str(run.folder)]
    result = npr(*arguments)
    assert (result.code, "serving.json does not exist" in result.err) == (2, True)

    (run.folder / "serving.json").write_text('{"version": null, "digest": null, "replicas": []}')
    assert "the run serves nothing yet" in npr(*arguments).err

    run.say_served(0, run.push(0).digest)
    assert npr(*arguments).code == 0
    changed(source, NORM, 3, 77.0)
    result = npr(*arguments)
    assert result.code == 1
    assert NORM in result.out

    run.say_served(1, run.push(1).digest)
    assert npr(*arguments).code == 0


def test_a_run_that_moved_on_or_holds_something_else_is_not_compared(npr, source, run):
    arguments = ["weights", "diff", str(source), str(run.folder)]
    digest = run.push(0).digest
    run.say_served(0, digest + 1)
    result = npr(*arguments)
    assert result.code == 2
    assert "the weights changed after they were published" in result.err
    run.say_served(0, digest)
    run.push(1)
    run.push(2)
    result = npr(*arguments)
    assert result.code == 2
    assert "serves version 0, arena" in result.err


def test_a_version_that_was_overwritten_while_it_was_read_is_noticed(run):
    run.say_served(0, run.push(0).digest)
    living = LiveRun(run.folder)
    living.check(None)
    run.push(1)
    run.push(2)
    with pytest.raises(StaleWeightsError, match="version 0 was overwritten while it was read"):
        living.check(None)
