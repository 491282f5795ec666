"""What is installed: hooks, plugins, methods, quantizers and hook points by name."""
