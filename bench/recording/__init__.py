"""What recording costs a request."""
