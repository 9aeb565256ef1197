"""What people see: the terminal view of a running stage, trees of trajectories, the stage table,
the page.

Shows, and judges nothing: whether an answer is valid is decided in ``schema`` and ``rewards``; the
outline drawn here is lenient, so that broken trajectories can be looked at too.
"""
