"""The three stages as one resumable run."""
