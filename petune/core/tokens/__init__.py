"""Which tokens a call has: virtual tokens, positions, generation."""
