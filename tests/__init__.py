"""Tests. A package, so that they can share ``tests.structures``."""
