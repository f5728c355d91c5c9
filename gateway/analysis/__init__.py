"""What recorded sessions look like: figures, and a report of them."""
