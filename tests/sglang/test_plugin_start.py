"""The plugin is in place where it was chosen, refuses to start where it cannot be, and leaves all
other servers alone.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from npr_megatron.engine.sglang.scheduler import support

ENGINE = """
import sys, sglang
if __name__ == "__main__":
    sglang.Engine(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native", dtype="float32",
        max_total_tokens=512, radix_cache_backend="npr", skip_tokenizer_init=True,
        skip_server_warmup=True, page_size=16, strip_thinking_cache=True, log_level="error",
    )
"""
HOOKS = """
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.registry import registered_radix_cache_backends
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

load_plugins()
assert "npr" in registered_radix_cache_backends()
calls = Sampler.forward, Req.update_finish_state, ForwardBatch.init_new
assert not any(hasattr(call, "__wrapped__") for call in calls)

from npr_megatron.engine.sglang.scheduler import plugin
from npr_megatron.engine.sglang.scheduler.orders import OrderBook
from npr_megatron.errors import EnvironmentFault

target = "sglang.srt.managers.schedule_batch.Req.update_finish_state"
HookRegistry.register(target, lambda result, *args, **kwargs: None, HookType.AFTER)
HookRegistry.apply_hooks()
try:
    plugin._apply_hooks(OrderBook())
except EnvironmentFault as error:
    print(error)
assert hasattr(Sampler.forward, "__wrapped__")
"""


def run_python(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, cwd=root
    )


@pytest.mark.filterwarnings("ignore")  # what SGLang says when it is imported
def test_this_sglang_has_all_that_is_used():
    assert support.version_problems(version("sglang")) == []
    assert support.attribute_problems(support.ATTRIBUTES, support.attributes_of) == []


@pytest.mark.slow
def test_a_server_that_cannot_run_stages_does_not_start_and_says_all_reasons(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.delenv("SGLANG_NATIVE_MOVE_KV_CACHE", raising=False)
    monkeypatch.setenv("SGLANG_RADIX_FORCE_MISS", "1")
    found = run_python(ENGINE, str(model_folder), folder=tmp_path)
    assert found.returncode != 0
    for sentence in (
        "SGLang cannot run NPR stages here",
        "page_size is 16 and must be 1",
        "strip_thinking_cache is True and must be False",
        "set SGLANG_NATIVE_MOVE_KV_CACHE=1",
        "SGLANG_RADIX_FORCE_MISS hides joined rows",
    ):
        assert sentence in found.stderr


@pytest.mark.slow
def test_other_servers_are_not_touched_and_other_plugins_not_overruled(tmp_path):
    found = run_python(HOOKS, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "Req.update_finish_state could not be hooked" in found.stdout
    assert "Sampler.forward" not in found.stdout
