"""Ray Serve deployments: ingress, grader, explainer, and how they share work."""
