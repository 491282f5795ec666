"""The benchmark harness: suites of cells, each trained in a process of its own, compared in one table and report."""
