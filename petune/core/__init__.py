"""Where a model can be adapted, and how a part is put there, trained, switched, saved, routed and merged."""
