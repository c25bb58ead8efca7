"""Full models: merging checkpoints against their base, adding a merged update to a base, DoRA against its base."""
