"""Starting weights shared with the distributed tests."""

from tests.distributed.conftest import hf_folder, untied_hf_folder

__all__ = ["hf_folder", "untied_hf_folder"]
