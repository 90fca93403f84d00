"""Reports on saved runs: a table and figures, from their small files alone."""
