"""What people see: terminal views and the final page."""
