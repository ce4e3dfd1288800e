"""`scalp synth`, `scalp prepare` and `scalp pseudonymize`."""
