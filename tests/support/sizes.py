"""Small sizes and timeouts for tests."""

SMALL = 64  # side of the model's input, pixels
CONNECTION_SECONDS = 2.0  # time limit of the endpoint for the head of a request
