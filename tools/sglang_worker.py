"""Serves requests by SGLang; run by tools/bench_engine_sglang.py in a process of its own.

Its argument is a JSON object of engine options. Each line that comes in is a JSON list of
[prompt ids, number of tokens]; each line that goes out is the number of seconds they took, the
first one 0 when the engine is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time

import sglang  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Serve until the input ends."""
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    answers = os.fdopen(int(sys.argv[2]), "w")
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        prompts, lengths = zip(*json.loads(line), strict=True)
        sampling = [
            {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True} for length in lengths
        ]
        started = time.perf_counter()
        outputs = engine.generate(input_ids=list(prompts), sampling_params=sampling)
        seconds = time.perf_counter() - started
        if [len(output["output_ids"]) for output in outputs] != list(lengths):
            raise SystemExit("SGLang generated fewer or more tokens than it was asked for")
        print(seconds, file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
