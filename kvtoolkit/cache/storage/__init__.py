"""Where keys and values are kept, and their copies between places."""
