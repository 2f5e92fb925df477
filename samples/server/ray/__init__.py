"""The server as a Ray Serve deployment: replicas, autoscaling, conversations that stay with a replica."""
