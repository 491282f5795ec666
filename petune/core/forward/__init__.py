"""Adapters around one computation; no module is touched here."""
