"""Files of tensors and folders that appear whole: what adapters and checkpoints are stored in. Knows neither."""
