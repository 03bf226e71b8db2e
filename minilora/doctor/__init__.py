"""What is wrong with an adapter folder, whoever made it. Read ``examine.py`` first."""
