"""The base model as it is without petune: modules, sites, weights, norms, configuration."""
