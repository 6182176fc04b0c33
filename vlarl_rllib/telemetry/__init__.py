"""What actors are called on Ray's dashboard, and what they tell Prometheus through Ray's metrics."""
