"""Where heads are in a model, and gates on them: layout by names and shapes, confirmed by passes."""
