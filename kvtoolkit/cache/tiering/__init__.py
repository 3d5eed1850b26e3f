"""Which tokens move to a smaller format, and the moves."""
