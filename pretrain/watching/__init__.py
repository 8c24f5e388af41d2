"""Watching a run while it trains: where its time goes, its numbers, its signs of life, its samples, its best checkpoint."""
