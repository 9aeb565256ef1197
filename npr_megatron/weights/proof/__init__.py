"""Whether a plan is right, said by code that shares no reasoning with the planner."""
