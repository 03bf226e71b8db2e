"""What a reader gets: for each lesson a file with functions to fill in. They are read as text, and need torch alone."""
