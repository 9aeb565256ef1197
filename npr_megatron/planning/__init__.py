"""What a push of weights will cost, before anything runs. No torch, no GPU, no weights.

::

    models, cluster        shapes of known models; links and memory of a described cluster
    push_volume            bytes each source sends and each node needs, counted from the plan
    push_floor             closed forms: what no executor can beat, and what direct and relay take
    relays                 which node forwards to which; who adopts whom after a death
    push_simulation        chunk by chunk, with jitter, slow and dead nodes

Closed forms and simulation know nothing of each other, and agree where both apply.
"""
