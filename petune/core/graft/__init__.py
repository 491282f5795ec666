"""What stands on a model's modules, and how it comes off."""
