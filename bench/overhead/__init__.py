"""What a gateway costs a request: ours, its peers and a bare relay before one mock engine."""
