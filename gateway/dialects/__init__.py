"""Wire dialects: what clients send and what pods answer."""
