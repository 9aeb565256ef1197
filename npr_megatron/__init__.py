"""Train language models that reason in parallel: Native Parallel Reasoners (arXiv 2512.07461).

Layers, each importing only what stands below it (enforced by import-linter)::

    cli                                   what a user types
    serving                               a model behind HTTP
    pipeline                              the three stages, resumable
    evaluation | launch | planning | report   measure, place on machines, foresee, show
    train      | rollout                  optimizer steps; the fleet of engines
    model      | engine                   Megatron GPT; NPR Engine
    data | rewards | weights | runtime    strangers
    topology                              who sees whom, at which position
    schema     | observability            the tag language; metrics and logs
    config     | records                  run description; values that cross processes
    errors

Shape letters used in names: B rows, S padded row length, T tokens of one trajectory, H hidden,
N query heads, K key-value heads, D head dim, V vocabulary, P prompts, G rollouts per prompt,
J branches per fork, M microbatches, W ranks.
"""

__version__ = "0.1.0"
