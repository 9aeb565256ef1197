"""What a push of weights will cost, before anything runs. No torch, no GPU, no weights.

::

    models, cluster, push_request   what is pushed, over which hardware, as people write it
    fleet_plan, fleet_bytes         transfer plans of a whole fleet; bytes counted from them
    push_volume                     those bytes by source and node: all that follows needs
    push_floor, pause               closed forms: what bounds a push, and what it takes
    relays, conditions              who forwards to whom; what goes wrong
    push_simulation                 chunk by chunk, with jitter, slow and dead nodes
    forecast, fleet_sweep           all of it as one value; times over the size of the fleet

Closed forms and simulation do not use each other's times, and agree where both apply.
"""
