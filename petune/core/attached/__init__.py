"""What a user holds: attach, a tuning, merge, save, load, route."""
