"""What an adapter can prove of itself: what lies in its folder, and that a server applies it. Read ``doctor.py`` first."""
