"""Loss, head and whole updates, timed against the lines people write."""
