"""What moves bytes: each executor carries out any ``TransferPlan`` and decides nothing itself."""
