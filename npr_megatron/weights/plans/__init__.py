"""From two layouts to the copies between them: who gives what to whom, for one engine or a fleet.

``plan.plan_transfer`` is the way in. Below it everything is columns of integers (``tile_table``,
``copy_table``): boxes are intersected (``intersect``), receivers and sources chosen by bytes
(``assignment``, ``balance``). Pure: no torch, no processes.
"""
