"""What people who run an endpoint ask it: readiness, metrics, models, the stories of requests; and its warmup."""
