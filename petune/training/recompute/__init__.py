"""What backward needs is computed again from what is kept anyway, where that costs next to nothing."""
