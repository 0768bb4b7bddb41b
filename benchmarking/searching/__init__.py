"""Parts of `search.py`."""
