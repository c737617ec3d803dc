"""CSV, and the tables and pictures made from it."""
