"""Loading models and fetching files: what names mean, where they come from, and in what precision they load."""
