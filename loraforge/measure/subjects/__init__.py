"""What is measured on, and by which loss: rows, a model at a start or an end, objectives."""
