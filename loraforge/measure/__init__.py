"""What fine-tuning does to attention heads: layout, gates, importance, Fisher, update, spectra, statistics, runs."""
