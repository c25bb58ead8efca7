"""What a head is worth: ablation, gradients on its gate, Fisher."""
