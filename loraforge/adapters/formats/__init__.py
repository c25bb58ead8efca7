"""What adapter files hold, format by format: keys sorted into modules, each with the way to its factors B and A."""
