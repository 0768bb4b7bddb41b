"""Names where scripts written for other evolutionary RL libraries look for them."""
