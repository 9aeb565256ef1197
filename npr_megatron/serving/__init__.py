"""A server that speaks OpenAI's protocol: chat and text completions over HTTP, on one engine.

Three threads: the main one opens and closes (``server``), one speaks HTTP (``app``), one decodes
(``engine.loop``). They meet in ``service``. What a client may ask is read in ``wire`` and turned
into requests of the engine in ``orders``; what it is shown is decided in ``linear`` and ``choices``
and spelt in ``formats``.

Streams
-------
A plain client gets plain text. The text of a parallel answer is its linear form: trunk, branch 1,
branch 2, ..., trunk, with its tags. Branch 1 is shown as it grows, what the others say meanwhile
waits for its turn, so the contents of all chunks together are the text that is returned without
streaming.

A client that sends ``"npr": {"branches": true}`` watches the branches as they run. Each of its
chunks says where its content belongs:

    {"event": "token", "block": b, "branch": k}         content goes on this stream
    {"event": "fork", "block": b, "num_branches": n}    the trunk pauses, n branches begin
    {"event": "join", "block": b}                       they have ended, the trunk goes on
    {"event": "restart", "weight_version": v}           new weights: all before is void
    {"event": "finish"}                                 the end

under ``npr`` of the chunk, next to ``choices``, which holds one choice. Block 0, branch 0 is the
trunk. The contents of a stream in the order of their arrival are its text; streams joined in linear
order are the plain text.

Every answer's end tells, under ``npr`` of its choice, why and after how much it ended:
``{"finish", "detail", "completion_tokens", "critical_path_tokens", "num_blocks"}``.
"""
