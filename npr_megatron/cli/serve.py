"""``npr serve``: a model behind an HTTP server that speaks OpenAI's protocol."""

from __future__ import annotations

import sys

from npr_megatron.cli import serve_options as option
from npr_megatron.cli.engine_options import Backend, BackendOption, DpSize, TpSize
from npr_megatron.cli.generate_options import Device, DtypeOption, Weights, WeightsOption
from npr_megatron.cli.interrupt import interruptible
from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.serving.serve_order import ServeOrder


def serve(
    model: option.Model,
    name: option.Name = None,
    host: option.HostOption = "127.0.0.1",
    port: option.Port = 8000,
    max_running: option.MaxRunning = 128,
    max_waiting: option.MaxWaiting = 512,
    kv_slots: option.KvSlots = 65_536,
    drain_seconds: option.DrainSeconds = 30.0,
    backend: BackendOption = Backend.EMBEDDED,
    tp_size: TpSize = 1,
    dp_size: DpSize = 1,
    device: Device = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = Weights.AS_TRAINED,
) -> None:
    """Serve a trained model over HTTP to clients of OpenAI's protocol.

    Examples:

      npr serve --model runs/quickstart-seed0/stages/npr/hf

      npr serve --model MODEL_DIR --backend sglang --host 0.0.0.0 --port 8000

    Then, with any client of that protocol:

      curl localhost:8000/v1/completions -d '{"prompt": "a:1+2+9;b:3+5+4?\\n", "temperature": 0}'

    Chat and text completions, streamed or not. Streams are plain text; a client that sends
    "npr": {"branches": true} watches the branches as they run. What else a request may hold is
    described at /docs; what is not supported is refused by name. /health says whether the server is
    ready, /metrics is for Prometheus.

    Ctrl-C and SIGTERM let answers under way end first.
    """
    order = ServeOrder(
        model_folder=model,
        name=name or str(model),
        engine=EngineConfig(
            backend=backend.value,
            tp_size=tp_size,
            sglang=SglangConfig(dp_size=dp_size),
            dtype="fp32" if dtype is None else dtype.value,
            weights=weights.value,
            num_kv_slots=kv_slots,
            max_running=max_running,
            kv_after_push="recompute",
        ),
        device=device,
        host=host,
        port=port,
        max_waiting=max_waiting,
        drain_s=drain_seconds,
    )
    with interruptible("nothing is served any more"):
        from npr_megatron.serving import server

        prepared = server.prepare(order, is_dtype_open=dtype is None)
        server.serve(prepared, lambda line: print(line, file=sys.stderr, flush=True))
