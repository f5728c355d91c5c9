"""What replicas of the gateway tell each other, through a Redis; `docs/replicas.md`."""
