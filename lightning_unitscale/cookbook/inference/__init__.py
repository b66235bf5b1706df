"""Trained models at work: predictions in a file, and held-out scores."""
