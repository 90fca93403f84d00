"""What saved runs say: a table and pictures, from their small files alone."""
