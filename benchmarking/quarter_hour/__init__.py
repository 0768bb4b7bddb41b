"""The parts of gpu_quarter_hour.py: what is carried to a card, what runs there, and the tables that come of it."""
