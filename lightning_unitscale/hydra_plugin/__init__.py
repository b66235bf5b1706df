"""What other Hydra applications get from this package; see `search_path.py`."""
