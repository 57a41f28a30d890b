"""What people who run an endpoint ask it: readiness, metrics, models, the stories of requests; and its warm-up.

Lives in the endpoint process.
"""
