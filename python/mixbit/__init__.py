"""mixbit."""
