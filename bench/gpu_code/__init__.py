"""GPU code without a GPU: compiled ahead of time, read, counted and executed as PTX."""
